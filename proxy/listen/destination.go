// SPDX-License-Identifier: Apache-2.0

package listen

import (
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
	var sa unix.RawSockaddrInet6 // has room for the other family
	level, size := unix.SOL_IP, unix.SizeofSockaddrInet4
	if v6 {
		level, size = unix.SOL_IPV6, unix.SizeofSockaddrInet6
	}
	n, err := getOption(fd, level, unix.SO_ORIGINAL_DST, unsafe.Slice((*byte)(unsafe.Pointer(&sa)), size))
	if err != nil || n < size {
		return netip.AddrPort{}
	}
	return loop.RawAddrPort(&sa)
}
