// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"net"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestSnapshotSeesEachChange: each thing that a capture may change shows, in the right place, and nothing else does.
func TestSnapshotSeesEachChange(t *testing.T) {
	n, pod, ext := pair(t)
	cg := n.Cgroup("cg")
	ext.Serve("tcp", "[::]:80", echo)
	pod.Clsact("lo")
	before := pod.Snapshot(cg)

	// Traffic alone changes nothing.
	c, err := pod.Dial("tcp", "10.99.0.1:80")
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if diff := cmp.Diff(before, pod.Snapshot(cg)); diff != "" {
		t.Errorf("traffic alone changes the snapshot:\n%s", diff)
	}

	check := func(change error) {
		t.Helper()
		if change != nil {
			t.Fatal(change)
		}
	}
	rule := func(family int) *netlink.Rule {
		r := netlink.NewRule()
		r.Family, r.Mark, r.Table, r.Priority = family, 0x10000000, 166, 60
		mask := uint32(0x70000000)
		r.Mask = &mask
		return r
	}
	route := func(cidr string) *netlink.Route {
		_, dst, err := net.ParseCIDR(cidr)
		check(err)
		return &netlink.Route{Dst: dst, LinkIndex: 1, Table: 166, Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST}
	}
	var attachedLink link.Link
	for _, tt := range []struct {
		name, where, text string
		do, undo          func()
	}{
		{
			"rule v4", "Rules", "fwmark=0x10000000",
			func() { check(pod.nl.RuleAdd(rule(unix.AF_INET))) }, func() { check(pod.nl.RuleDel(rule(unix.AF_INET))) },
		},
		{
			"rule v6", "Rules", "inet6 rule",
			func() { check(pod.nl.RuleAdd(rule(unix.AF_INET6))) }, func() { check(pod.nl.RuleDel(rule(unix.AF_INET6))) },
		},
		{
			"route v4", "Routes", "table=166",
			func() { check(pod.nl.RouteAdd(route("0.0.0.0/0"))) }, func() { check(pod.nl.RouteDel(route("0.0.0.0/0"))) },
		},
		{
			"route v6", "Routes", "table=166",
			func() { check(pod.nl.RouteAdd(route("::/0"))) }, func() { check(pod.nl.RouteDel(route("::/0"))) },
		},
		{"clsact", "Qdiscs", "dev=eth0", func() { pod.Clsact("eth0") }, func() { pod.NoClsact("eth0") }},
		{"filter", "Filters", "dev=lo", func() { pod.Filter("lo", 7) }, func() { pod.NoClsact("lo"); pod.Clsact("lo") }},
		{
			"sysctl", "Sysctls", "net.ipv4.fwmark_reflect = 1",
			func() { pod.Sysctl("net.ipv4.fwmark_reflect", "1") }, func() { pod.Sysctl("net.ipv4.fwmark_reflect", "0") },
		},
		{
			"cgroup program", "Programs", "program=",
			func() { attachedLink = attachSomething(t, cg) }, func() { check(attachedLink.Close()) },
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.do()
			diff := cmp.Diff(before, pod.Snapshot(cg))
			if !strings.Contains(diff, tt.where) || !strings.Contains(diff, tt.text) {
				t.Errorf("the change does not show as %q in %s:\n%s", tt.text, tt.where, diff)
			}
			tt.undo()
			if diff := cmp.Diff(before, pod.Snapshot(cg)); diff != "" {
				t.Errorf("the change was undone, but there is a difference:\n%s", diff)
			}
		})
	}
}

func attachSomething(t *testing.T, cg *Cgroup) link.Link {
	t.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSock, AttachType: ebpf.AttachCGroupInetSockCreate, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	dir, err := os.Open(cg.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	l, err := link.AttachRawLink(link.RawLinkOptions{Target: int(dir.Fd()), Program: program, Attach: ebpf.AttachCGroupInetSockCreate})
	if err != nil {
		t.Fatal(err)
	}
	return l
}
