// SPDX-License-Identifier: Apache-2.0

package rootless

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/route"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Host is what the command is to see of the host's network: its addresses, and from which of them it would go where.
type Host struct {
	Addresses []netip.Addr  `json:"addresses"` // but for those of the loopback device
	Routes    []Destination `json:"routes"`
	NoIPv6    bool          `json:"no_ipv6"` // it is switched off
}

// Destination is where the host has a route to, and the address that it takes for it.
type Destination struct {
	To     netip.Prefix `json:"to"`
	Source netip.Addr   `json:"source"`
}

// Look reads the network namespace of this process.
func Look() (Host, error) {
	var h Host
	off, _ := os.ReadFile("/proc/sys/net/ipv6/conf/lo/disable_ipv6") // nothing, where the kernel does not speak it
	h.NoIPv6 = strings.TrimSpace(string(off)) == "1"
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		addresses, err := route.List(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, family) })
		if errors.Is(err, unix.EAFNOSUPPORT) {
			continue
		}
		if err != nil {
			return h, fmt.Errorf("list the addresses of this host: %w", err)
		}
		for _, a := range addresses {
			ip, ok := netip.AddrFromSlice(a.IP)
			if ip = ip.Unmap(); ok && !ip.IsLoopback() && !ip.IsLinkLocalUnicast() && a.Flags&unix.IFA_F_TENTATIVE == 0 {
				h.Addresses = append(h.Addresses, ip)
			}
		}
		routes, err := route.List(func() ([]netlink.Route, error) { return netlink.RouteList(nil, family) })
		if err != nil {
			return h, fmt.Errorf("list the routes of this host: %w", err)
		}
		for _, r := range routes {
			if d, ok := destination(r, family); ok {
				h.Routes = append(h.Routes, d)
			}
		}
	}
	h.Routes = shorten(h.Routes)
	return h, nil
}

// shorten leaves out what a wider destination says already: a router has hundreds of thousands of routes, and few addresses.
func shorten(all []Destination) (short []Destination) {
	slices.SortStableFunc(all, func(a, b Destination) int { return a.To.Bits() - b.To.Bits() })
	said := make(map[netip.Prefix]netip.Addr) // the source, by destination
	for _, d := range all {
		if _, there := said[d.To]; there {
			continue // by a route of a greater metric: the kernel lists them in the order of their metrics
		}
		source, covered := netip.Addr{}, false
		for bits := d.To.Bits(); bits >= 0 && !covered; bits-- {
			wider, _ := d.To.Addr().Prefix(bits)
			source, covered = said[wider]
		}
		if !covered || source != d.Source {
			said[d.To] = d.Source
			short = append(short, d)
		}
	}
	return short
}

// destination is a route of the main table; false if it leads nowhere, or from nowhere. Local ones are there where the host is
// such a namespace itself.
func destination(r netlink.Route, family int) (d Destination, ok bool) {
	d.To = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	if family == unix.AF_INET6 {
		d.To = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	if r.Dst != nil {
		to, ok := netip.AddrFromSlice(r.Dst.IP)
		bits, _ := r.Dst.Mask.Size()
		if !ok {
			return d, false
		}
		d.To = netip.PrefixFrom(to.Unmap(), bits).Masked()
	}
	to := d.To.Addr()
	if r.Type != unix.RTN_UNICAST && r.Type != unix.RTN_LOCAL || to.IsLinkLocalUnicast() || to.IsLoopback() || to.IsMulticast() {
		return d, false
	}
	if r.Src != nil {
		d.Source, ok = netip.AddrFromSlice(r.Src)
		d.Source = d.Source.Unmap()
		return d, ok
	}
	found, err := netlink.RouteGetWithOptions(inside(d.To).AsSlice(), &netlink.RouteGetOptions{OifIndex: r.LinkIndex})
	if err != nil || len(found) == 0 {
		return d, false
	}
	d.Source, ok = netip.AddrFromSlice(found[0].Src)
	d.Source = d.Source.Unmap()
	return d, ok && !d.Source.IsLoopback()
}

// inside is an address of a host in a network: of everything, one that is in use nowhere (RFC 5737, RFC 3849).
func inside(p netip.Prefix) netip.Addr {
	switch {
	case p.Bits() == 0 && p.Addr().Is4():
		return netip.AddrFrom4([4]byte{198, 51, 100, 1})
	case p.Bits() == 0:
		return netip.MustParseAddr("2001:db8::1")
	case p.IsSingleIP():
		return p.Addr()
	}
	return p.Addr().Next() // of the first, some mean the network itself
}

// family of an address.
func family(a netip.Addr) redirect.Family {
	if a.Is4() {
		return redirect.IPv4
	}
	return redirect.IPv6
}
