// SPDX-License-Identifier: Apache-2.0

package listen

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"github.com/pillionproxy/pillion/proxy/loop"
	"golang.org/x/sys/unix"
)

// findDestination sets the local address of a connection that was accepted at the port to the one that its client meant.
//
// Most captures leave it as it is. One that rewrites it (REDIRECT) makes it the listener's own, and connection tracking
// remembers what it was. So only at the listener's own port there is something to ask. No answer, or the same address,
// means that this was meant: another host's (a connection to that very port of it, captured as it is), or our listener
// itself, which Listener.At tells.
func (c *Conn) findDestination(port uint16) {
	if c.local.Port() != port {
		return
	}
	var meant netip.AddrPort
	_ = c.Control(func(fd int) error { // fails only if it is closed
		meant = originalDestination(fd, c.v6)
		return nil
	})
	if meant.IsValid() && meant != c.local {
		c.local, c.redirected = meant, true
	}
}

// originalDestination is to whom the SYN of an accepted socket was addressed, as connection tracking has it; the zero
// value if it has nothing: ENOENT, the connection is not tracked, or its entry was flushed; ENOPROTOOPT, there is no
// connection tracking in this kernel. It takes no capability.
//
// The option is SO_ORIGINAL_DST for IPv4 (linux/netfilter_ipv4.h) and IP6T_SO_ORIGINAL_DST for IPv6
// (linux/netfilter_ipv6/ip6_tables.h), both 80.
func originalDestination(fd int, v6 bool) netip.AddrPort {
	if !v6 {
		var sa unix.RawSockaddrInet4
		n, err := getOption(fd, unix.SOL_IP, unix.SO_ORIGINAL_DST, unsafe.Slice((*byte)(unsafe.Pointer(&sa)), unsafe.Sizeof(sa)))
		if err != nil || n < unix.SizeofSockaddrInet4 || sa.Family != unix.AF_INET {
			return netip.AddrPort{}
		}
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), hostOrder(sa.Port))
	}
	var sa unix.RawSockaddrInet6
	n, err := getOption(fd, unix.SOL_IPV6, unix.SO_ORIGINAL_DST, unsafe.Slice((*byte)(unsafe.Pointer(&sa)), unsafe.Sizeof(sa)))
	if err != nil || n < unix.SizeofSockaddrInet6 || sa.Family != unix.AF_INET6 {
		return netip.AddrPort{}
	}
	addr := netip.AddrFrom16(sa.Addr)
	if sa.Scope_id != 0 {
		addr = addr.WithZone(loop.ZoneName(sa.Scope_id))
	}
	return netip.AddrPortFrom(addr, hostOrder(sa.Port))
}

// hostOrder converts a port as it stands in a raw socket address.
func hostOrder(port uint16) uint16 {
	return binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, port))
}
