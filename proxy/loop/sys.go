// SPDX-License-Identifier: Apache-2.0

package loop

import (
	"net/netip"
	"os"
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
	var from sockaddr
	n, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(fd), uintptr(unsafe.Pointer(&from)), uintptr(from.room()),
		unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	if errno != 0 {
		return -1, netip.AddrPort{}, errno
	}
	return int32(n), RawAddrPort(&from.RawSockaddrInet6), 0
}

// address asks with getsockname or getpeername; the zero value if there is none.
func address(call uintptr, fd int32) netip.AddrPort {
	var a sockaddr
	if _, _, errno := unix.RawSyscall(call, uintptr(fd), uintptr(unsafe.Pointer(&a)), uintptr(a.room())); errno != 0 {
		return netip.AddrPort{}
	}
	return RawAddrPort(&a.RawSockaddrInet6)
}

// connect begins to connect. It is raw too: towards a peer of this host it is the whole handshake, and takes its time.
func connect(fd int32, to netip.AddrPort) unix.Errno {
	var a sockaddr
	a.set(to)
	for {
		_, _, errno := unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&a)), uintptr(a.size))
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

func setOption(fd int32, level, option, value int) unix.Errno {
	v := int32(value)
	_, _, errno := unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option), uintptr(unsafe.Pointer(&v)), unsafe.Sizeof(v), 0)
	return errno
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
	if errno := setOption(int32(fd), unix.SOL_SOCKET, unix.SO_OOBINLINE, 1); errno != 0 {
		return os.NewSyscallError("setsockopt SO_OOBINLINE", errno)
	}
	if errno := setOption(int32(fd), unix.SOL_TCP, unix.TCP_NODELAY, 1); errno != 0 {
		return os.NewSyscallError("setsockopt TCP_NODELAY", errno)
	}
	return nil
}

// atMark reports whether the urgent byte is the next one to be received.
func atMark(fd int32) bool {
	at, err := unix.IoctlGetUint32(int(fd), unix.SIOCATMARK)
	return err == nil && at == 1
}

// putOff reports whether a receive at the urgent byte that found nothing has to be tried again. It says EAGAIN while a signal is
// pending, whatever there is to read (tcp_recvmsg_locked in net/ipv4/tcp.c), and Go's scheduler sends signals all the time.
// Nothing would wake us a second time for what is there already.
func putOff(fd int32) bool {
	p := []unix.PollFd{{Fd: fd, Events: unix.POLLIN}}
	n, err := unix.Poll(p, 0)
	return err == unix.EINTR || n > 0
}
