// SPDX-License-Identifier: Apache-2.0

package check

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/ebpf"
	"github.com/pillionproxy/pillion/redirect/route"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// gatherSysctls looks at those that a plan sets.
func gatherSysctls() []Sysctl {
	var list []Sysctl
	for _, s := range ebpf.Plan(config.Capture{}, redirect.Host{IPv6: true}, redirect.Persistent).Sysctls {
		list = append(list, Sysctl{
			Name: s.Name, Want: s.Value, Why: s.Why,
			Value: sysctl(strings.ReplaceAll(s.Name, ".", "/")), Writable: writableFile(s.Path()),
		})
	}
	return list
}

// writableFile opens a parameter for writing and writes nothing. access(2) would ask for the real user's rights, and
// these files also open for CAP_NET_ADMIN.
func writableFile(path string) Answer {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	switch {
	case err == nil:
		f.Close()
		return Answer{State: OK}
	case errors.Is(err, unix.EROFS):
		return Answer{State: Missing, Detail: "/proc/sys is mounted read-only"}
	case errors.Is(err, unix.ENOENT):
		return Answer{State: Missing, Detail: "there is no such parameter"}
	default:
		return Answer{State: Unknown, Detail: missingRight(err, "CAP_NET_ADMIN")}
	}
}

func gatherIPv6() IPv6 {
	var v IPv6
	dirs, err := os.ReadDir("/proc/sys/net/ipv6/conf")
	if err != nil {
		return v
	}
	v.Kernel = true
	for _, d := range dirs {
		name := d.Name()
		off := sysctl("net/ipv6/conf/"+name+"/disable_ipv6") == "1"
		switch {
		case name == "default":
		case off:
			v.Off = append(v.Off, name)
		default:
			v.On = v.On || name != "all"
		}
	}
	return v
}

func gatherNetwork() Network {
	var n Network
	for _, f := range []redirect.Family{redirect.IPv4, redirect.IPv6} {
		family := unix.AF_INET
		if f == redirect.IPv6 {
			family = unix.AF_INET6
		}
		rules, err := foreignRules(f, family)
		if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
			n.RulesErr = err.Error()
		}
		n.Rules = append(n.Rules, rules...)
		for slot := config.Slot(0); slot < config.Slots; slot++ {
			for _, table := range []int{slot.TableCapture(), slot.TableClosed()} {
				if routes, err := route.Routes(family, table); err == nil && len(routes) > 0 {
					n.Routes = append(n.Routes, table)
				}
			}
		}
	}
	n.Listening = listeners()
	var first, last uint16
	if _, err := fmt.Sscan(sysctl("net/ipv4/ip_local_port_range"), &first, &last); err == nil {
		n.AppPorts = config.PortRange{First: first, Last: last}
	}
	return n
}

// foreignRules are the rules of a family but those of a capture of ours.
func foreignRules(f redirect.Family, number int) ([]Rule, error) {
	rows, err := route.List(func() ([]netlink.Rule, error) { return netlink.RuleList(number) })
	if err != nil {
		return nil, err
	}
	var rules []Rule
	for _, n := range rows {
		r := Rule{Family: f, Priority: max(n.Priority, 0), Mark: n.Mark, Table: max(n.Table, 0)}
		if n.Mask != nil {
			r.Mask = *n.Mask
		}
		if n.Type == unix.RTN_UNREACHABLE {
			r.Table = 0
		}
		r.Selective = n.Src != nil || n.Dst != nil || n.IifName != "" || n.OifName != "" || n.UIDRange != nil || n.Dport != nil || n.Sport != nil || n.IPProto != 0 || n.Invert
		if !isOurs(r) {
			rules = append(rules, r)
		}
	}
	return rules, nil
}

// isOurs reports whether a slot has such a rule: by its mark, or in its place and for its table.
func isOurs(r Rule) bool {
	for slot := config.Slot(0); slot < config.Slots; slot++ {
		if r.Priority >= slot.RulePriority() && r.Priority < slot.RulePriority()+10 && r.Table == slot.TableCapture() {
			return true
		}
		for _, m := range redirect.MarkRules(slot, r.Family) {
			if r.Priority == m.Priority && r.Mark == m.Mark && r.Mask == m.Mask && r.Table == m.Table {
				return true
			}
		}
	}
	return false
}

// listeners are the listening TCP sockets of the network namespace. Whose they are is seen of processes that this one may
// look into.
func listeners() []Listener {
	inodes := map[string]uint16{}
	var list []Listener
	for _, name := range []string{"tcp", "tcp6"} {
		b, err := os.ReadFile("/proc/thread-self/net/" + name)
		if err != nil {
			continue
		}
		for port, inode := range listening(string(b)) {
			inodes[inode] = port
		}
	}
	owners := owners(inodes)
	seen := map[Listener]bool{}
	for inode, port := range inodes {
		if l := (Listener{port, owners[inode]}); !seen[l] {
			seen[l] = true
			list = append(list, l)
		}
	}
	return list
}

// listening reads /proc/net/tcp (proc_pid_net(5)): the ports of sockets in state LISTEN (0A), by their inode.
func listening(text string) func(yield func(uint16, string) bool) {
	return func(yield func(uint16, string) bool) {
		for line := range strings.Lines(text) {
			f := strings.Fields(line)
			if len(f) < 10 || f[3] != "0A" {
				continue
			}
			_, hex, _ := strings.Cut(f[1], ":")
			port, err := strconv.ParseUint(hex, 16, 16)
			if err == nil && !yield(uint16(port), f[9]) {
				return
			}
		}
	}
}

// owners finds the names of the processes that have the sockets.
func owners(inodes map[string]uint16) map[string]string {
	found := map[string]string{}
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, fd := range fds {
		target, err := os.Readlink(fd)
		if err != nil {
			continue // it is gone, or not ours to see
		}
		inode := strings.TrimSuffix(strings.TrimPrefix(target, "socket:["), "]")
		if _, ok := inodes[inode]; !ok || found[inode] != "" {
			continue
		}
		if comm, err := os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(fd)), "comm")); err == nil {
			found[inode] = strings.TrimSpace(string(comm))
		}
	}
	return found
}
