// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Clsact gives a device a clsact queueing discipline, as another user of tc would.
func (ns *Namespace) Clsact(device string) {
	ns.t.Helper()
	if err := ns.nl.QdiscAdd(ns.clsact(device)); err != nil {
		ns.t.Fatalf("testnet: clsact on %s of %s: %v", device, ns.Name, err)
	}
}

// NoClsact takes the clsact of a device away, with all its filters.
func (ns *Namespace) NoClsact(device string) {
	ns.t.Helper()
	if err := ns.nl.QdiscDel(ns.clsact(device)); err != nil {
		ns.t.Fatalf("testnet: remove clsact from %s of %s: %v", device, ns.Name, err)
	}
}

func (ns *Namespace) clsact(device string) *netlink.Clsact {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: ns.link(device).Attrs().Index, Parent: netlink.HANDLE_CLSACT, Handle: netlink.MakeHandle(0xffff, 0),
	}}
}

// Filter adds a BPF filter to the ingress of a device that has a clsact. It passes everything on: the filter of somebody
// else, that must outlive us.
func (ns *Namespace) Filter(device string, priority uint16) {
	ns.t.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "someone_else", Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}, // TC_ACT_UNSPEC: go on with the next filter
	})
	if err != nil {
		ns.t.Fatalf("testnet: load a filter: %v", err)
	}
	defer program.Close()
	err = ns.nl.FilterAdd(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: ns.link(device).Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Priority: priority, Protocol: unix.ETH_P_ALL,
			Handle: 1,
		},
		Fd: program.FD(), Name: "someone_else", DirectAction: true,
	})
	if err != nil {
		ns.t.Fatalf("testnet: filter on %s of %s: %v", device, ns.Name, err)
	}
}
