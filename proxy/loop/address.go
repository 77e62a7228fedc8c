// SPDX-License-Identifier: Apache-2.0

package loop

import (
	"encoding/binary"
	"net"
	"net/netip"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sockaddr is an address as the kernel has it, of either family.
type sockaddr struct {
	unix.RawSockaddrInet6 // has room for the other
	size                  uint32
}

// room prepares for the kernel to write an address, and is where it finds and leaves its size.
func (a *sockaddr) room() unsafe.Pointer {
	a.size = unix.SizeofSockaddrInet6
	return unsafe.Pointer(&a.size)
}

// v4 is the same address of IPv4.
func (a *sockaddr) v4() *unix.RawSockaddrInet4 {
	return (*unix.RawSockaddrInet4)(unsafe.Pointer(&a.RawSockaddrInet6))
}

func (a *sockaddr) set(to netip.AddrPort) {
	port := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, to.Port()))
	if to.Addr().Is4() {
		*a.v4() = unix.RawSockaddrInet4{Family: unix.AF_INET, Port: port, Addr: to.Addr().As4()}
		a.size = unix.SizeofSockaddrInet4
		return
	}
	a.RawSockaddrInet6 = unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: port, Addr: to.Addr().As16(), Scope_id: zoneIndex(to.Addr().Zone())}
	a.size = unix.SizeofSockaddrInet6
}

// RawAddrPort is an address as the kernel has it, of either family: what is of IPv4 is a RawSockaddrInet4 in truth. The zero value for
// what is no address of TCP.
func RawAddrPort(sa *unix.RawSockaddrInet6) netip.AddrPort {
	a := sockaddr{RawSockaddrInet6: *sa}
	port := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, a.Port))
	switch a.Family {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4(a.v4().Addr), port)
	case unix.AF_INET6:
		return AddrPort(&unix.SockaddrInet6{Port: int(port), ZoneId: a.Scope_id, Addr: a.Addr})
	default:
		return netip.AddrPort{}
	}
}

// Sockaddr converts an address to its form in system calls. A zone is the name of an interface, or its index in digits.
func Sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16(), ZoneId: zoneIndex(a.Addr().Zone())}
}

// AddrPort is the reverse of Sockaddr; the zero value for what is no address of TCP. An IPv4 address in the form of an IPv6 one
// comes out as the former.
func AddrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		addr := netip.AddrFrom16(sa.Addr).Unmap()
		if sa.ZoneId != 0 && addr.Is6() {
			addr = addr.WithZone(zoneName(sa.ZoneId))
		}
		return netip.AddrPortFrom(addr, uint16(sa.Port))
	default:
		return netip.AddrPort{}
	}
}

// zoneName is the zone of an interface, as package net has it: its name, or in digits if it is gone.
func zoneName(index uint32) string {
	if i, err := net.InterfaceByIndex(int(index)); err == nil {
		return i.Name
	}
	return strconv.FormatUint(uint64(index), 10)
}

// zoneIndex is the reverse.
func zoneIndex(zone string) uint32 {
	if zone == "" {
		return 0
	}
	if i, err := net.InterfaceByName(zone); err == nil {
		return uint32(i.Index)
	}
	n, _ := strconv.ParseUint(zone, 10, 32) // 0, no zone, if it is neither
	return uint32(n)
}
