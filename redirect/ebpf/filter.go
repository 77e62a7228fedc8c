// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"errors"
	"fmt"
	"slices"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/route"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
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

const clsactHandle = 0xffff0000

func clsact(index int) *netlink.Clsact {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Handle: clsactHandle, Parent: netlink.HANDLE_CLSACT}}
}

// hasClsact reports whether the interface has a clsact qdisc.
func hasClsact(index int) (bool, error) {
	rows, err := route.List(func() ([]netlink.Qdisc, error) {
		return netlink.QdiscList(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: index}})
	})
	if err != nil {
		return false, fmt.Errorf("list qdiscs: %w", err)
	}
	return slices.ContainsFunc(rows, func(q netlink.Qdisc) bool { return q.Type() == "clsact" }), nil
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

// putFilter attaches the program, or puts it in the place of the one that is there, without a moment between. If newClsact,
// the qdisc is made with it: both are one message to the kernel, so that no SIGKILL comes between the qdisc and the note
// that says that it is ours.
func putFilter(slot config.Slot, f redirect.Filter, fd int, n note, newClsact bool) error {
	var batch batch
	if newClsact {
		batch.add(unix.RTM_NEWQDISC, unix.NLM_F_CREATE|unix.NLM_F_EXCL,
			&nl.TcMsg{Ifindex: int32(f.Index), Handle: clsactHandle, Parent: netlink.HANDLE_CLSACT},
			nl.NewRtAttr(nl.TCA_KIND, nl.ZeroTerminated("clsact")))
	}
	options := nl.NewRtAttr(nl.TCA_OPTIONS, nil)
	options.AddRtAttr(nl.TCA_BPF_FD, nl.Uint32Attr(uint32(fd)))
	options.AddRtAttr(nl.TCA_BPF_NAME, nl.ZeroTerminated(n.String()))
	options.AddRtAttr(nl.TCA_BPF_FLAGS, nl.Uint32Attr(nl.TCA_BPF_FLAG_ACT_DIRECT))
	batch.add(unix.RTM_NEWTFILTER, unix.NLM_F_CREATE,
		&nl.TcMsg{
			Ifindex: int32(f.Index), Parent: parent(f.Egress), Handle: filterHandle,
			Info: netlink.MakeHandle(slot.FilterPriority(), nl.Swap16(unix.ETH_P_ALL)),
		},
		nl.NewRtAttr(nl.TCA_KIND, nl.ZeroTerminated("bpf")), options)
	if err := batch.send(); err != nil {
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
