// SPDX-License-Identifier: Apache-2.0

package check

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/pillionproxy/pillion/redirect/rootless"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Lab is what was tried out in a network namespace that was made for it and is gone.
type Lab struct {
	Ran      Answer   `json:"ran"`       // whether there was one; the rest is unknown otherwise
	InnerUID bool     `json:"inner_uid"` // in a user namespace of its own: what failed may work for root
	Clsact   Answer   `json:"clsact"`
	Rootless Answer   `json:"rootless"` // the packet filter of the backend rootless
	Tables   []Tables `json:"tables"`
}

// Tables is one iptables program.
type Tables struct {
	Program string            `json:"program"` // iptables-nft, ip6tables-legacy, …
	Family  int               `json:"family"`  // 4 or 6
	Flavour string            `json:"flavour"` // nft or legacy
	Version string            `json:"version"`
	Restore bool              `json:"restore"` // its -restore is there
	Tried   map[string]Answer `json:"tried"`   // extension -> whether a rule with it could be added
	Rules   int               `json:"rules"`   // in the host's own tables of this flavour and family; filled in by Gather
}

// Runner starts a program and gives what it printed. env is added to the environment.
type Runner func(ctx context.Context, env []string, program string, args ...string) (output string, err error)

// extension is a match or target of iptables, and a rule that has it.
type extension struct {
	name, table, chain, rule string
	needs                    map[Backend]Need
}

// extensions are those that the backends' rules are made of. Ids are 0, the only ones that exist in a user namespace of
// our own.
var extensions = []extension{
	{name: "comment", table: "mangle", chain: "OUTPUT", rule: "-m comment --comment pillion -j ACCEPT", needs: needs(Better, TProxy, Redirect)},
	{name: "owner", table: "mangle", chain: "OUTPUT", rule: "-m owner --uid-owner 0 --gid-owner 0 -j ACCEPT", needs: needs(Required, TProxy, Redirect)},
	{name: "addrtype", table: "mangle", chain: "OUTPUT", rule: "-m addrtype --dst-type LOCAL -j ACCEPT", needs: needs(Required, TProxy, Redirect)},
	{name: "mark", table: "mangle", chain: "OUTPUT", rule: "-m mark --mark 0x10000000/0x70000000 -j ACCEPT", needs: needs(Required, TProxy)},
	{name: "MARK", table: "mangle", chain: "OUTPUT", rule: "-j MARK --set-xmark 0x10000000/0x70000000", needs: needs(Required, TProxy)},
	{name: "TPROXY", table: "mangle", chain: "PREROUTING", rule: "-p tcp -j TPROXY --on-port 16001 --tproxy-mark 0x10000000/0x70000000", needs: needs(Required, TProxy)},
	{name: "socket", table: "mangle", chain: "PREROUTING", rule: "-p tcp -m socket --nowildcard -j ACCEPT", needs: needs(Required, TProxy)},
	{name: "REDIRECT", table: "nat", chain: "OUTPUT", rule: "-p tcp -j REDIRECT --to-ports 16001", needs: needs(Required, Redirect)},
	{name: "conntrack", table: "mangle", chain: "OUTPUT", rule: "-m conntrack --ctdir REPLY -j ACCEPT", needs: needs(Better, Redirect)},
	{name: "connmark", table: "mangle", chain: "OUTPUT", rule: "-m connmark --mark 0x10000000/0x70000000 -j ACCEPT", needs: needs(Better, Redirect)},
}

// RunLab tries out what cannot be asked for. The caller has put this process into a network namespace of its own, and
// into a user namespace of its own where it has no right to the former alone.
func RunLab(ctx context.Context, run Runner) Lab {
	lab := Lab{Ran: Answer{State: OK}, InnerUID: innerUser(), Clsact: tryClsact(), Rootless: tryRootless()}
	for _, family := range []int{4, 6} {
		lab.Tables = append(lab.Tables, tryTables(ctx, run, family, lab.InnerUID)...)
	}
	return lab
}

func tryRootless() Answer {
	if err := rootless.Try(); err != nil {
		return Answer{State: Missing, Detail: err.Error()}
	}
	return Answer{State: OK, Detail: "its rules were just set"}
}

func tryClsact() Answer {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return Answer{State: Unknown, Detail: err.Error()}
	}
	q := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: lo.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
	err = netlink.QdiscAdd(q)
	switch {
	case err == nil:
		return Answer{State: OK, Detail: "added to an interface made for it"}
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EOPNOTSUPP):
		return Answer{State: Missing, Detail: "the kernel has no sch_ingress (CONFIG_NET_SCH_INGRESS): " + err.Error()}
	default:
		return Answer{State: Unknown, Detail: err.Error()}
	}
}

// tryTables tries the programs of one family, each in the tables of this namespace.
func tryTables(ctx context.Context, run Runner, family int, inner bool) []Tables {
	base := "iptables"
	if family == 6 {
		base = "ip6tables"
	}
	var found []Tables
	seen := map[string]bool{}
	for _, name := range []string{base + "-nft", base + "-legacy", base} {
		path := lookPath(name)
		if path == "" {
			continue
		}
		out, err := run(ctx, lockFree, path, "-V")
		t := Tables{Program: name, Family: family, Version: versionOf(out), Flavour: flavourOf(out)}
		if err != nil || seen[t.Flavour] {
			continue // the plain name is one of the other two
		}
		seen[t.Flavour] = true
		t.Restore = lookPath(name+"-restore") != ""
		t.Tried = map[string]Answer{}
		for _, x := range extensions {
			args := append([]string{"-t", x.table, "-A", x.chain}, strings.Fields(x.rule)...)
			out, err := run(ctx, lockFree, path, args...)
			t.Tried[x.name] = tried(out, err, inner)
		}
		found = append(found, t)
	}
	return found
}

// lockFree keeps iptables from making its lock file in the host's file system. Nobody else is in this namespace.
var lockFree = []string{"XTABLES_LOCKFILE=/dev/null"}

func tried(out string, err error, inner bool) Answer {
	switch {
	case err == nil:
		return Answer{State: OK}
	case inner:
		return Answer{State: Unknown, Detail: "tried without root, who could load its module: " + firstLine(out)}
	default:
		return Answer{State: Missing, Detail: firstLine(out)}
	}
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line
}

var versionText = regexp.MustCompile(`v(\d+(\.\d+)+)`)

func versionOf(s string) string {
	if m := versionText.FindStringSubmatch(s); m != nil {
		return m[1]
	}
	return "of unknown version"
}

// flavourOf reads what -V says in brackets; before 1.8 there was but the one.
func flavourOf(s string) string {
	if strings.Contains(s, "nf_tables") {
		return "nft"
	}
	return "legacy"
}

// lookPath finds a program also where the PATH of users has no sbin.
func lookPath(name string) string {
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin", "/usr/local/sbin") {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && !info.IsDir() && info.Mode()&0o111 != 0 && filepath.IsAbs(path) {
			return path
		}
	}
	return ""
}

// innerUser reports whether this process is in a user namespace that is not the machine's.
func innerUser() bool {
	b, err := os.ReadFile("/proc/self/uid_map")
	var inside, outside, count uint64
	if err != nil {
		return false
	}
	n, _ := fmt.Sscan(string(b), &inside, &outside, &count)
	return n != 3 || inside != 0 || outside != 0 || count != 1<<32-1
}
