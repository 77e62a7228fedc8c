// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"github.com/pillionproxy/pillion/redirect"
)

// openPort is a port on which the command listens, and where it is met there in each family; at the loopback address if it can be.
type openPort struct {
	Port   uint16
	V4, V6 netip.Addr
}

// openPorts are those of the sockets that listen, but for one of our own, in the order of their numbers. A socket of IPv6 that
// takes every address takes IPv4's, too, unless it was told not to, which cannot be seen.
func openPorts(sockets []redirect.Listening, ours uint16) []openPort {
	ports := make(map[uint16]openPort)
	prefer := func(old, found, loopback netip.Addr) netip.Addr {
		switch {
		case found.IsUnspecified():
			return loopback
		case old == loopback:
			return old
		}
		return found
	}
	for _, s := range sockets {
		if s.Local.Port() == ours {
			continue
		}
		p, addr := ports[s.Local.Port()], s.Local.Addr()
		p.Port = s.Local.Port()
		if addr.Unmap().Is4() || addr == netip.IPv6Unspecified() {
			p.V4 = prefer(p.V4, addr.Unmap(), netip.MustParseAddr("127.0.0.1"))
		}
		if addr.Is6() && !addr.Is4In6() {
			p.V6 = prefer(p.V6, addr, netip.IPv6Loopback())
		}
		ports[s.Local.Port()] = p
	}
	return slices.SortedFunc(maps.Values(ports), func(a, b openPort) int { return cmp.Compare(a.Port, b.Port) })
}
