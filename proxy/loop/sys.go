// SPDX-License-Identifier: Apache-2.0

package loop

import (
	"net"
	"net/netip"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Calls that are made for each event or piece of data are raw: all descriptors are non-blocking, so there is nothing for Go's
// scheduler to be told of, and telling it costs as much as the call. An Errno of 0 is none.

func recv(fd int32, p []byte) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)),
		unix.MSG_DONTWAIT, 0, 0)
	return int(n), errno
}

func send(fd int32, p []byte, flags int) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)),
		uintptr(flags|unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL), 0, 0)
	return int(n), errno
}

func splice(from, to int32, size int) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(size), unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
	return int(n), errno
}

// accept takes a connection and the address of its peer, for which it is too late to ask once the peer has reset it.
func accept(fd int32) (int32, netip.AddrPort, unix.Errno) {
	var sa unix.RawSockaddrInet6 // has room for the other family
	size := uint32(unsafe.Sizeof(sa))
	n, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(fd), uintptr(unsafe.Pointer(&sa)), uintptr(unsafe.Pointer(&size)),
		unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	if errno != 0 {
		return -1, netip.AddrPort{}, errno
	}
	port := *(*[2]byte)(unsafe.Pointer(&sa.Port)) // network order
	from := unix.Sockaddr(&unix.SockaddrInet6{Port: int(port[0])<<8 | int(port[1]), ZoneId: sa.Scope_id, Addr: sa.Addr})
	if sa.Family == unix.AF_INET {
		v4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(&sa))
		from = &unix.SockaddrInet4{Port: int(port[0])<<8 | int(port[1]), Addr: v4.Addr}
	}
	return int32(n), AddrPort(from), 0
}

// connect begins to connect. It is raw too: towards a peer of this host it is the whole handshake, and takes its time.
func connect(fd int32, to netip.AddrPort) unix.Errno {
	var v4 unix.RawSockaddrInet4
	var v6 unix.RawSockaddrInet6
	sa, size := unsafe.Pointer(&v4), unsafe.Sizeof(v4)
	port := [2]byte{byte(to.Port() >> 8), byte(to.Port())} // network order
	if to.Addr().Is4() {
		v4.Family, v4.Port, v4.Addr = unix.AF_INET, *(*uint16)(unsafe.Pointer(&port)), to.Addr().As4()
	} else {
		v6.Family, v6.Port, v6.Addr = unix.AF_INET6, *(*uint16)(unsafe.Pointer(&port)), to.Addr().As16()
		v6.Scope_id = zoneIndex(to.Addr().Zone())
		sa, size = unsafe.Pointer(&v6), unsafe.Sizeof(v6)
	}
	for {
		_, _, errno := unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(sa), size)
		if errno != unix.EINTR {
			return errno
		}
	}
}

func closeDescriptor(fd int32) { _, _, _ = unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

func shutdownWrite(fd int32) unix.Errno {
	_, _, errno := unix.RawSyscall(unix.SYS_SHUTDOWN, uintptr(fd), unix.SHUT_WR, 0)
	return errno
}

func epollCtl(epoll int32, op uintptr, fd int32, ev unix.EpollEvent) unix.Errno {
	_, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(epoll), op, uintptr(fd), uintptr(unsafe.Pointer(&ev)), 0, 0)
	return errno
}

// epollPoll asks for events without waiting.
func epollPoll(epoll int32, evs []unix.EpollEvent) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(epoll), uintptr(unsafe.Pointer(unsafe.SliceData(evs))), uintptr(len(evs)), 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}

// wakeUp makes an eventfd readable.
func wakeUp(fd int32) {
	one := uint64(1)
	_, _, _ = unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(&one)), unsafe.Sizeof(one))
}

func setLinger(fd int32, on bool) {
	var l unix.Linger
	if on {
		l.Onoff = 1
	}
	_, _, _ = unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_LINGER, uintptr(unsafe.Pointer(&l)), unsafe.Sizeof(l), 0)
}

// SetStream sets what every connection has: a reset instead of a clean end if the process dies; urgent data in line, without
// which the urgent byte would be lost; and nothing held back for more to come. Accepted sockets inherit it, so that it is to be set
// before a socket listens; the package itself does it for others.
func SetStream(fd int) error {
	setLinger(int32(fd), true)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1); err != nil {
		return os.NewSyscallError("setsockopt SO_OOBINLINE", err)
	}
	return os.NewSyscallError("setsockopt TCP_NODELAY", unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_NODELAY, 1))
}

// atMark reports whether the urgent byte is the next one to be received.
func atMark(fd int32) bool {
	at, err := unix.IoctlGetUint32(int(fd), unix.SIOCATMARK)
	return err == nil && at == 1
}

// putOff reports whether a receive that found nothing has to be tried again. At the urgent byte, it says EAGAIN while a signal is
// pending, whatever there is to read (tcp_recvmsg_locked in net/ipv4/tcp.c), and Go's scheduler sends signals all the time.
// Nothing would wake us a second time for what is there already.
func putOff(fd int32) bool {
	if !atMark(fd) {
		return false
	}
	p := []unix.PollFd{{Fd: fd, Events: unix.POLLIN}}
	n, err := unix.Poll(p, 0)
	return err == unix.EINTR || n > 0
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
			addr = addr.WithZone(ZoneName(sa.ZoneId))
		}
		return netip.AddrPortFrom(addr, uint16(sa.Port))
	default:
		return netip.AddrPort{}
	}
}

// ZoneName is the zone of an interface, as package net has it: its name, or in digits if it is gone.
func ZoneName(index uint32) string {
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
