// SPDX-License-Identifier: Apache-2.0

package listen

import (
	"errors"
	"net/netip"
	"os"
	"unsafe"

	"github.com/pillionproxy/pillion/proxy/loop"
	"golang.org/x/sys/unix"
)

// Keepalive of both sides of a relayed connection, in seconds: a peer that vanished is noticed after
// idle + count × interval, six minutes.
const (
	keepaliveIdle     = 180
	keepaliveInterval = 30
	keepaliveCount    = 6
)

// ipPktOptions is IP_PKTOPTIONS of linux/in.h, which x/sys/unix lacks.
const ipPktOptions = 9

// SetOption sets an integer socket option. The error is an *os.SyscallError that carries the option's name.
func SetOption(fd int, name string, level, opt, value int) error {
	return os.NewSyscallError("setsockopt "+name, unix.SetsockoptInt(fd, level, opt, value))
}

// SetTransparent lets the socket use local addresses that are not this host's. It takes CAP_NET_RAW.
func SetTransparent(fd int, v6 bool) error {
	if v6 {
		return SetOption(fd, "IPV6_TRANSPARENT", unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1)
	}
	return SetOption(fd, "IP_TRANSPARENT", unix.SOL_IP, unix.IP_TRANSPARENT, 1)
}

// mayBeTransparent reports whether the process may have transparent sockets in its network namespace.
func mayBeTransparent() bool {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return true // not a matter of rights: whoever listens next is told
	}
	defer func() { _ = unix.Close(fd) }()
	return !errors.Is(SetTransparent(fd, false), unix.EPERM)
}

// getOption reads a socket option into buf and returns its length.
func getOption(fd, level, opt int, buf []byte) (int, error) {
	size := uint32(len(buf))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(opt),
		uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return 0, errno
	}
	return min(int(size), len(buf)), nil
}

// SetKeepalive has a peer noticed that vanished.
func SetKeepalive(fd int) error {
	for _, o := range []struct {
		name              string
		level, opt, value int
	}{
		{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{"TCP_KEEPIDLE", unix.SOL_TCP, unix.TCP_KEEPIDLE, keepaliveIdle},
		{"TCP_KEEPINTVL", unix.SOL_TCP, unix.TCP_KEEPINTVL, keepaliveInterval},
		{"TCP_KEEPCNT", unix.SOL_TCP, unix.TCP_KEEPCNT, keepaliveCount},
	} {
		if err := SetOption(fd, o.name, o.level, o.opt, o.value); err != nil {
			return err
		}
	}
	return nil
}

// setPacketInfo makes the kernel remember, for accepted sockets, by which device the SYN came in.
func setPacketInfo(fd int, v6 bool) error {
	if v6 {
		return SetOption(fd, "IPV6_2292PKTINFO", unix.SOL_IPV6, unix.IPV6_2292PKTINFO, 1)
	}
	return SetOption(fd, "IP_PKTINFO", unix.SOL_IP, unix.IP_PKTINFO, 1)
}

// arrivalDevice is the index of the device by which the SYN of an accepted socket came in; 0 if it is not known. On a
// stream socket, PKTOPTIONS reads the control messages that a datagram would have had (ip(7) does not tell; see
// do_ip_getsockopt in net/ipv4/ip_sockglue.c).
func arrivalDevice(fd int, v6 bool) int {
	var buf [256]byte
	level, opt := unix.SOL_IP, ipPktOptions
	if v6 {
		level, opt = unix.SOL_IPV6, unix.IPV6_2292PKTOPTIONS
	}
	n, err := getOption(fd, level, opt, buf[:])
	if err != nil || n == 0 {
		return 0
	}
	messages, err := unix.ParseSocketControlMessage(buf[:n])
	if err != nil {
		return 0
	}
	for _, m := range messages {
		switch {
		// struct in_pktinfo starts with the index; struct in6_pktinfo has it after the 16 bytes of the address.
		case !v6 && m.Header.Level == unix.SOL_IP && m.Header.Type == unix.IP_PKTINFO && len(m.Data) >= 4:
			return int(*(*int32)(unsafe.Pointer(&m.Data[0])))
		case v6 && m.Header.Level == unix.SOL_IPV6 && m.Header.Type == unix.IPV6_2292PKTINFO && len(m.Data) >= 20:
			return int(*(*int32)(unsafe.Pointer(&m.Data[16])))
		}
	}
	return 0
}

// IsOwn reports whether the address is one of this host: whether a socket can be bound to it.
func IsOwn(a netip.Addr) bool {
	family := unix.AF_INET6
	if a.Is4() {
		family = unix.AF_INET
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer func() { _ = unix.Close(fd) }()
	return unix.Bind(fd, loop.Sockaddr(netip.AddrPortFrom(a, 0))) == nil
}
