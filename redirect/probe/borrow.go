// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"github.com/pillionproxy/pillion/redirect"
	"golang.org/x/sys/unix"
)

// Borrowed is the proxy's listener while no proxy runs: nobody gets in but those that Admit names.
type Borrowed struct {
	l *net.TCPListener // nil: a proxy has the port
}

// Borrow takes the proxy's port of a family on the loopback address, if no proxy has it.
func Borrow(f redirect.Family, port uint16) (*Borrowed, error) {
	return borrow(netip.AddrPortFrom(LoopbackOf(f), port))
}

// BorrowAny is Borrow on all addresses.
func BorrowAny(f redirect.Family, port uint16) (*Borrowed, error) {
	any := netip.IPv4Unspecified()
	if f == redirect.IPv6 {
		any = netip.IPv6Unspecified()
	}
	return borrow(netip.AddrPortFrom(any, port))
}

func borrow(address netip.AddrPort) (*Borrowed, error) {
	l, err := listen(context.Background(), address, func(fd int) error {
		return errors.Join(transparent(fd, address.Addr()), dropAllSYNs(fd))
	})
	if errors.Is(err, unix.EADDRINUSE) {
		return &Borrowed{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("borrow the proxy's port %d: %w", address.Port(), err)
	}
	return &Borrowed{l}, nil
}

// Free reports whether no proxy has the port: it is ours then.
func (b *Borrowed) Free() bool { return b.l != nil }

// Admit lets connections from one source port in, and from no other.
func (b *Borrowed) Admit(port uint16) error {
	raw, err := b.l.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := raw.Control(func(fd uintptr) { serr = admitOnly(int(fd), port) }); err != nil {
		return err
	}
	return serr
}

// Close gives the port back.
func (b *Borrowed) Close() error {
	if b.l == nil {
		return nil
	}
	return b.l.Close()
}

// admitOnly attaches a socket filter that sees the TCP header of what comes to the listener: its first two bytes are the
// source port.
func admitOnly(fd int, port uint16) error {
	return attachFilter(fd, []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_H | unix.BPF_ABS, K: 0},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(port), Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0xffffffff},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	})
}

func dropAllSYNs(fd int) error {
	return attachFilter(fd, []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0}})
}

func attachFilter(fd int, program []unix.SockFilter) error {
	err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]})
	if err != nil {
		return fmt.Errorf("filter what a listener accepts: %w", err)
	}
	return nil
}

func transparent(fd int, a netip.Addr) error {
	level, option := unix.SOL_IP, unix.IP_TRANSPARENT
	if a.Is6() {
		level, option = unix.SOL_IPV6, unix.IPV6_TRANSPARENT
	}
	if err := unix.SetsockoptInt(fd, level, option, 1); err != nil {
		return fmt.Errorf("make a socket transparent: %w", err)
	}
	return nil
}

// listen opens a listener without MPTCP, which hooks would not see. set, if not nil, prepares the socket.
func listen(ctx context.Context, a netip.AddrPort, set func(fd int) error) (*net.TCPListener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	if set != nil {
		lc.Control = func(_, _ string, c syscall.RawConn) error {
			var serr error
			if err := c.Control(func(fd uintptr) { serr = set(int(fd)) }); err != nil {
				return err
			}
			return serr
		}
	}
	network := "tcp4"
	if a.Addr().Is6() {
		network = "tcp6"
	}
	l, err := lc.Listen(ctx, network, a.String())
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

// LoopbackOf is the loopback address of a family.
func LoopbackOf(f redirect.Family) netip.Addr {
	if f == redirect.IPv6 {
		return netip.IPv6Loopback()
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1})
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
	}
	return netip.AddrPort{}
}
