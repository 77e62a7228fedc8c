// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"github.com/pillionproxy/pillion/bpf"
	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/probe"
	"github.com/pillionproxy/pillion/redirect/route"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// injector lets a connection that is dialled on this host arrive by a real interface (bpf/probe.bpf.c).
type injector struct {
	program *ebpf.Program
	probes  *ebpf.Map
	detach  func() error
}

// injectPriority puts the injector's filter before those of every slot.
const injectPriority = 165

func newInjector(slot config.Slot) (*injector, error) {
	spec, err := bpf.LoadProbe()
	if err != nil {
		return nil, err
	}
	if err := spec.Variables[bpf.ProbeVarCfg].Set(bpf.CaptureSettings{Shift: slot.Shift()}); err != nil {
		return nil, fmt.Errorf("set the BPF constants: %w", err)
	}
	var objects struct {
		Program *ebpf.Program `ebpf:"pln_probe"`
		Probes  *ebpf.Map     `ebpf:"probes"`
	}
	raised := rlimit.RemoveMemlock()
	if err := spec.LoadAndAssign(&objects, nil); err != nil {
		return nil, loadFault(err, raised)
	}
	in := &injector{program: objects.Program, probes: objects.Probes}
	if in.detach, err = attachFirst(objects.Program); err != nil {
		in.program.Close()
		in.probes.Close()
		return nil, err
	}
	return in, nil
}

// attachFirst attaches a program to the ingress of lo before all others: by tcx, which ends with this process, else by
// clsact.
func attachFirst(p *ebpf.Program) (detach func() error, err error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, fmt.Errorf("find lo: %w", err)
	}
	index := lo.Attrs().Index
	l, err := link.AttachTCX(link.TCXOptions{Interface: index, Program: p, Attach: ebpf.AttachTCXIngress, Anchor: link.Head()})
	if err == nil {
		return l.Close, nil
	}
	if !errors.Is(err, ebpf.ErrNotSupported) {
		return nil, fmt.Errorf("attach %s to lo: %w", bpf.ProbeProgPlnProbe, err)
	}
	had, err := hasClsact(index)
	if err != nil {
		return nil, err
	}
	if !had {
		if err := netlink.QdiscAdd(clsact(index)); err != nil {
			return nil, fmt.Errorf("add clsact to lo: %w", err)
		}
	}
	f := bpfFilter(0, index, false)
	f.Priority, f.Fd, f.Name = injectPriority, p.FD(), "pillion-probe"
	if err := netlink.FilterReplace(f); err != nil {
		return nil, fmt.Errorf("attach %s to lo: %w", bpf.ProbeProgPlnProbe, err)
	}
	return func() error {
		if !had {
			return delClsact(index)
		}
		return netlink.FilterDel(f)
	}, nil
}

// Arm names the connection: its source port, and the interface by which it is to arrive.
func (in *injector) Arm(port uint16, index int, mac net.HardwareAddr) error {
	var probe bpf.ProbeProbe
	probe.Port = uint32(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, port)))
	probe.Ifindex = uint32(index)
	copy(probe.Mac[:6], mac)
	if err := in.probes.Put(uint32(0), &probe); err != nil {
		return fmt.Errorf("arm the probe: %w", err)
	}
	return nil
}

func (in *injector) Close() error {
	return errors.Join(in.detach(), in.program.Close(), in.probes.Close())
}

// ownAddress is an address of this host, and what it takes to arrive there from outside.
type ownAddress struct {
	Addr      netip.Addr
	Link      string
	Index     int
	MAC       net.HardwareAddr
	Neighbour netip.Addr // an address that could be a client's: on the link, not ours; invalid: not to be had
}

// ownAddresses lists one global address of each family for every interface that is up, but lo.
func ownAddresses() (map[redirect.Family][]ownAddress, error) {
	links, err := route.List(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	own := make(map[redirect.Family][]ownAddress)
	for _, l := range links {
		a := l.Attrs()
		if a.Flags&net.FlagUp == 0 || a.Flags&net.FlagLoopback != 0 {
			continue
		}
		for f, family := range map[redirect.Family]int{redirect.IPv4: unix.AF_INET, redirect.IPv6: unix.AF_INET6} {
			rows, err := route.List(func() ([]netlink.Addr, error) { return netlink.AddrList(l, family) })
			if err != nil {
				continue // it vanished
			}
			if o, ok := choose(rows, a); ok {
				own[f] = append(own[f], o)
			}
		}
	}
	return own, nil
}

// choose takes the first usable address of an interface.
func choose(rows []netlink.Addr, link *netlink.LinkAttrs) (ownAddress, bool) {
	for _, row := range rows {
		addr, ok := netip.AddrFromSlice(row.IP)
		addr = addr.Unmap()
		if !ok || addr.IsLinkLocalUnicast() || row.Flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) != 0 {
			continue
		}
		ones, _ := row.Mask.Size()
		o := ownAddress{Addr: addr, Link: link.Name, Index: link.Index, MAC: link.HardwareAddr}
		if link.EncapType == "ether" {
			o.Neighbour = neighbour(netip.PrefixFrom(addr, ones), rows)
		}
		return o, true
	}
	return ownAddress{}, false
}

// neighbour is an address of the prefix that is not ours, nor the network's or its broadcast address; in a prefix too
// small for one, an address of a documentation range (RFC 5737, RFC 3849).
func neighbour(p netip.Prefix, ours []netlink.Addr) netip.Addr {
	last := p.Masked().Addr()
	for range 16 {
		last = last.Next()
		if !p.Contains(last) || !p.Contains(last.Next()) {
			break
		}
		taken := false
		for _, row := range ours {
			a, _ := netip.AddrFromSlice(row.IP)
			taken = taken || a.Unmap() == last
		}
		if !taken {
			return last
		}
	}
	if p.Addr().Is4() {
		return probe.Nobody(redirect.IPv4)
	}
	return probe.Nobody(redirect.IPv6)
}
