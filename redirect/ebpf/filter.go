// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"errors"
	"fmt"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/route"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// filterHandle is the handle of our one filter per side, priority and slot.
const filterHandle = 1

// attached is one of our filters as it was found.
type attached struct {
	Index   int
	Link    string
	Egress  bool
	Program uint32 // id
	Note    note
}

// listFilters finds every filter of ours in the network namespace, and how many filters of others share each interface's
// clsact qdisc.
func listFilters() (ours []attached, others map[int]int, err error) {
	links, err := route.List(netlink.LinkList)
	if err != nil {
		return nil, nil, fmt.Errorf("list interfaces: %w", err)
	}
	others = make(map[int]int)
	for _, l := range links {
		for _, egress := range []bool{false, true} {
			rows, err := route.List(func() ([]netlink.Filter, error) { return netlink.FilterList(l, parent(egress)) })
			if err != nil {
				if gone(err) {
					continue
				}
				return nil, nil, fmt.Errorf("list filters of %s: %w", l.Attrs().Name, err)
			}
			for _, row := range rows {
				b, isBPF := row.(*netlink.BpfFilter)
				if !isBPF {
					others[l.Attrs().Index]++
					continue
				}
				n, ok := parseNote(b.Name)
				if !ok {
					others[l.Attrs().Index]++
					continue
				}
				ours = append(ours, attached{Index: l.Attrs().Index, Link: l.Attrs().Name, Egress: egress, Program: uint32(b.Id), Note: n})
			}
		}
	}
	return ours, others, nil
}

func parent(egress bool) uint32 {
	if egress {
		return netlink.HANDLE_MIN_EGRESS
	}
	return netlink.HANDLE_MIN_INGRESS
}

// gone reports whether an interface, or its qdisc, vanished while it was looked at.
func gone(err error) bool {
	return errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL)
}

func clsact(index int) *netlink.Clsact {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
}

// addClsact makes sure that the interface has a clsact qdisc; added is false where it had one.
func addClsact(index int, link string) (added bool, err error) {
	switch err := netlink.QdiscAdd(clsact(index)); {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.EEXIST):
		return false, nil
	case errors.Is(err, unix.EPERM):
		return false, &config.Fault{Err: fmt.Errorf("add clsact to %s: %w", link, err), Hint: "it takes CAP_NET_ADMIN in the network namespace", Exit: config.ExitNoPerm}
	default:
		return false, fmt.Errorf("add clsact to %s: %w", link, err)
	}
}

func bpfFilter(slot config.Slot, index int, egress bool) *netlink.BpfFilter {
	return &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: index, Parent: parent(egress), Handle: filterHandle,
			Protocol: unix.ETH_P_ALL, Priority: slot.FilterPriority(),
		},
		DirectAction: true,
	}
}

// putFilter attaches the program, or puts it in the place of the one that is there, without a moment between.
func putFilter(slot config.Slot, f redirect.Filter, fd int, n note) error {
	b := bpfFilter(slot, f.Index, f.Egress)
	b.Fd, b.Name = fd, n.String()
	if err := netlink.FilterReplace(b); err != nil {
		return fmt.Errorf("attach %s to %s %s: %w", f.Program, f.Link, f.Direction(), err)
	}
	return nil
}

func delFilter(slot config.Slot, index int, egress bool) error {
	if err := netlink.FilterDel(bpfFilter(slot, index, egress)); err != nil && !gone(err) {
		return fmt.Errorf("detach the filter of interface %d: %w", index, err)
	}
	return nil
}

func delClsact(index int) error {
	if err := netlink.QdiscDel(clsact(index)); err != nil && !gone(err) {
		return fmt.Errorf("remove clsact of interface %d: %w", index, err)
	}
	return nil
}
