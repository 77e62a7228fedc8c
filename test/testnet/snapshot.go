// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Snapshot is everything of a host that a capture may change, as sorted lines of text, to be compared with go-cmp.
type Snapshot struct {
	Rules    []string // ip rule, both families
	Routes   []string // ip route show table all, both families
	Qdiscs   []string // tc qdisc
	Filters  []string // tc filter on every device, both ways, and tcx programs
	Programs []string // attached to the cgroup itself
	Sysctls  []string // those that a capture needs
}

// Snapshot takes the state of the namespace and, unless it is nil, of the cgroup. Counters, ages and other values that
// change by themselves are left out; every other attribute is in, also those unknown to this package.
func (ns *Namespace) Snapshot(cg *Cgroup) Snapshot {
	ns.t.Helper()
	var s Snapshot
	var err error
	ns.Do(func() { s, err = takeSnapshot() })
	if err != nil {
		ns.t.Fatalf("testnet: snapshot of %s: %v", ns.Name, err)
	}
	if cg != nil {
		s.Programs = cg.Programs()
	}
	for _, key := range []string{"net.ipv4.tcp_fwmark_accept", "net.ipv4.fwmark_reflect", "net.ipv6.fwmark_reflect"} {
		s.Sysctls = append(s.Sysctls, key+" = "+ns.SysctlValue(key))
	}
	return s
}

func takeSnapshot() (s Snapshot, err error) {
	links, err := netlink.LinkList()
	if err != nil {
		return s, fmt.Errorf("list devices: %w", err)
	}
	names := map[uint32]string{}
	for _, l := range links {
		names[uint32(l.Attrs().Index)] = l.Attrs().Name
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := dump(unix.RTM_GETRULE, nl.NewIfInfomsg(family), ruleText)
		if err != nil {
			return s, fmt.Errorf("list rules: %w", err)
		}
		s.Rules = append(s.Rules, rules...)
		routes, err := dump(unix.RTM_GETROUTE, nl.NewIfInfomsg(family), func(b []byte) (string, error) { return routeText(b, names) })
		if err != nil {
			return s, fmt.Errorf("list routes: %w", err)
		}
		s.Routes = append(s.Routes, routes...)
	}
	tc := func(b []byte) (string, error) { return tcText(b, names) }
	if s.Qdiscs, err = dump(unix.RTM_GETQDISC, &nl.TcMsg{Family: nl.FAMILY_ALL}, tc); err != nil {
		return s, fmt.Errorf("list qdiscs: %w", err)
	}
	for index, name := range names {
		for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
			filters, err := dump(unix.RTM_GETTFILTER, &nl.TcMsg{Family: nl.FAMILY_ALL, Ifindex: int32(index), Parent: parent}, tc)
			if err != nil && !errors.Is(err, unix.EINVAL) { // there is no clsact
				return s, fmt.Errorf("list filters of %s: %w", name, err)
			}
			s.Filters = append(s.Filters, filters...)
		}
		for _, attach := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
			programs, err := attached(int(index), attach)
			if err != nil {
				return s, err
			}
			for _, p := range programs {
				s.Filters = append(s.Filters, "dev="+name+" "+p)
			}
		}
	}
	slices.Sort(s.Filters)
	return s, nil
}

// dump lists objects of the kernel through netlink, each as one line of text.
func dump(kind int, msg nl.NetlinkRequestData, text func([]byte) (string, error)) ([]string, error) {
	req := nl.NewNetlinkRequest(kind, unix.NLM_F_DUMP)
	req.AddData(msg)
	// What comes back is of the kind NEW, which is GET minus two.
	answers, err := req.Execute(unix.NETLINK_ROUTE, uint16(kind-2))
	if err != nil {
		return nil, err
	}
	var lines []string
	for _, b := range answers {
		line, err := text(b)
		if err != nil {
			return nil, err
		}
		lines = append(lines, line)
	}
	slices.Sort(lines)
	return lines, nil
}

// Programs lists the BPF programs attached to the cgroup itself.
func (cg *Cgroup) Programs() []string {
	cg.t.Helper()
	dir, err := os.Open(cg.Path)
	if err != nil {
		cg.t.Fatalf("testnet: %v", err)
	}
	defer dir.Close()
	var lines []string
	for _, attach := range cgroupAttachTypes {
		programs, err := attached(int(dir.Fd()), attach)
		if err != nil {
			cg.t.Fatalf("testnet: programs of %s: %v", cg.Path, err)
		}
		lines = append(lines, programs...)
	}
	return lines
}

var cgroupAttachTypes = []ebpf.AttachType{
	ebpf.AttachCGroupInetIngress, ebpf.AttachCGroupInetEgress, ebpf.AttachCGroupInetSockCreate,
	ebpf.AttachCgroupInetSockRelease, ebpf.AttachCGroupSockOps, ebpf.AttachCGroupDevice,
	ebpf.AttachCGroupInet4Bind, ebpf.AttachCGroupInet6Bind, ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect,
	ebpf.AttachCGroupInet4PostBind, ebpf.AttachCGroupInet6PostBind,
	ebpf.AttachCGroupUDP4Sendmsg, ebpf.AttachCGroupUDP6Sendmsg, ebpf.AttachCGroupUDP4Recvmsg, ebpf.AttachCGroupUDP6Recvmsg,
	ebpf.AttachCGroupSysctl, ebpf.AttachCGroupGetsockopt, ebpf.AttachCGroupSetsockopt,
	ebpf.AttachCgroupInet4GetPeername, ebpf.AttachCgroupInet6GetPeername,
	ebpf.AttachCgroupInet4GetSockname, ebpf.AttachCgroupInet6GetSockname,
}

// attached lists the programs at one hook; none where the kernel does not have the hook.
func attached(target int, attach ebpf.AttachType) ([]string, error) {
	result, err := link.QueryPrograms(link.QueryOptions{Target: target, Attach: attach})
	if errors.Is(err, unix.EINVAL) || errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("programs at %v: %w", attach, err)
	}
	var lines []string
	for _, p := range result.Programs {
		lines = append(lines, fmt.Sprintf("%v program=%d", attach, p.ID))
	}
	return lines, nil
}
