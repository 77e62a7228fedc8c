// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Dial is how an agent connects. The zero value of everything but To is the plain case: a blocking connect on a TCP
// socket of the family of To.
type Dial struct {
	To       string        // address and port
	Mapped   bool          // connect an IPv6 socket to the IPv4 address To, as Java does
	From     string        // address and port (0: any) to bind to before the connect
	Reuse    bool          // SO_REUSEADDR, for From
	NonBlock bool          // O_NONBLOCK: EINPROGRESS, then poll and SO_ERROR
	MPTCP    bool          // an MPTCP socket
	FastOpen []byte        // TCP_FASTOPEN_CONNECT: connect at once, and this is the first write
	Device   string        // SO_BINDTODEVICE
	Mark     int           // SO_MARK
	Socket   int           // a socket of the agent's own, of Agent.Socket, in place of a new one; it is connected once
	Timeout  time.Duration // of the connect; 0: as long as the kernel takes
}

// Conn is a connection that an agent made. The socket belongs to the agent's cgroup for good; what is done with it is
// done by the test.
type Conn struct {
	*net.TCPConn
	// Own and Peer are what getsockname and getpeername said to the agent after the connect, as they said it: a mapped
	// address is shown as one.
	Own, Peer netip.AddrPort
}

type names struct {
	Own, Peer netip.AddrPort
}

var (
	dialOp   = fileOp[Dial, names]{"testnet.dial", dial}
	listenOp = fileOp[Listening, netip.AddrPort]{"testnet.listen", listen}
	socketOp = NewOp("testnet.socket", socket)
)

// Dial connects from the agent. Closing is the caller's.
func (a *Agent) Dial(d Dial) (*Conn, error) {
	r, err := a.call(dialOp.name, d)
	if err != nil {
		return nil, err
	}
	var n names
	if err := json.Unmarshal(r.Result, &n); err != nil {
		return nil, err
	}
	defer r.file.Close()
	c, err := net.FileConn(r.file)
	if err != nil {
		return nil, err
	}
	return &Conn{TCPConn: c.(*net.TCPConn), Own: n.Own, Peer: n.Peer}, nil
}

// Listening is how an agent listens. The zero value of everything but the first two is the plain case.
type Listening struct {
	Network, Addr string
	Device        string // SO_BINDTODEVICE
	Mark          int    // SO_MARK
	MPTCP         bool   // an MPTCP socket, as Go programs make by themselves
	Keep          bool   // the agent keeps the socket open as well, so that it is found among its descriptors
}

// Listen listens in the agent's namespace and cgroup, and hands the socket over. See Namespace.Listen.
func (a *Agent) Listen(network, addr string) (*net.TCPListener, error) {
	return a.ListenAs(Listening{Network: network, Addr: addr})
}

// ListenAs is Listen, with socket options.
func (a *Agent) ListenAs(l Listening) (*net.TCPListener, error) {
	r, err := a.call(listenOp.name, l)
	if err != nil {
		return nil, err
	}
	defer r.file.Close()
	ln, err := net.FileListener(r.file)
	if err != nil {
		return nil, err
	}
	return ln.(*net.TCPListener), nil
}

// Serve is Listen and then the function Serve.
func (a *Agent) Serve(network, addr string, handler func(*net.TCPConn)) *Server {
	a.t.Helper()
	ln, err := a.Listen(network, addr)
	if err != nil {
		a.t.Fatalf("testnet: listen on %s by agent %d: %v", addr, a.Pid(), err)
	}
	return Serve(a.t, ln, handler)
}

// Socket makes a TCP socket of the family (unix.AF_INET, AF_INET6) that the agent keeps, for a Dial later on.
func (a *Agent) Socket(family int) (int, error) { return socketOp.Call(a, family) }

// socket runs in the agent.
func socket(family int) (int, error) {
	return unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
}

// listen runs in the agent.
func listen(args Listening) (netip.AddrPort, *os.File, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) { err = prepare(int(fd), 0, Dial{Device: args.Device, Mark: args.Mark}) })
		return errors.Join(cerr, err)
	}}
	lc.SetMultipathTCP(args.MPTCP)
	ln, err := lc.Listen(context.Background(), args.Network, args.Addr)
	if err != nil {
		return netip.AddrPort{}, nil, err
	}
	file, err := ln.(*net.TCPListener).File()
	if args.Keep {
		kept.Store(ln, nil)
	} else {
		ln.Close()
	}
	return ln.Addr().(*net.TCPAddr).AddrPort(), file, err
}

// kept are the listeners that an agent keeps open until it ends.
var kept sync.Map

// dial runs in the agent. It makes the very system calls that a C program would make; Go's net package has its own ways.
func dial(d Dial) (names, *os.File, error) {
	to, err := netip.ParseAddrPort(d.To)
	if err != nil {
		return names{}, nil, err
	}
	family := unix.AF_INET
	if to.Addr().Is6() || d.Mapped {
		family = unix.AF_INET6
	}
	kind, proto := unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP
	if d.NonBlock {
		kind |= unix.SOCK_NONBLOCK
	}
	if d.MPTCP {
		proto = unix.IPPROTO_MPTCP
	}
	fd := d.Socket
	if fd == 0 {
		if fd, err = unix.Socket(family, kind, proto); err != nil {
			return names{}, nil, fmt.Errorf("socket: %w", err)
		}
	}
	n, err := connect(fd, family, to, d)
	if err != nil {
		unix.Close(fd)
		return names{}, nil, err
	}
	return n, os.NewFile(uintptr(fd), "dialled"), nil
}

func connect(fd, family int, to netip.AddrPort, d Dial) (n names, err error) {
	if err := prepare(fd, family, d); err != nil {
		return n, err
	}
	err = ignoringEINTR(func() error { return unix.Connect(fd, sockaddr(family, to)) })
	if d.NonBlock && errors.Is(err, unix.EINPROGRESS) {
		err = finish(fd, d.Timeout)
	}
	if err != nil {
		return n, fmt.Errorf("connect %s: %w", to, err)
	}
	if len(d.FastOpen) > 0 {
		if _, err := unix.Write(fd, d.FastOpen); err != nil {
			return n, fmt.Errorf("first write to %s: %w", to, err)
		}
		if err := finish(fd, d.Timeout); err != nil { // the write may have gone with the SYN
			return n, fmt.Errorf("connect %s: %w", to, err)
		}
	}
	own, err := unix.Getsockname(fd)
	if err != nil {
		return n, fmt.Errorf("getsockname: %w", err)
	}
	peer, err := unix.Getpeername(fd)
	if errors.Is(err, unix.ENOTCONN) { // the connection was there, and is gone already: how, the socket knows
		if soerr, serr := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); serr == nil && soerr != 0 {
			return n, fmt.Errorf("connected to %s, and at once: %w", to, unix.Errno(soerr))
		}
	}
	if err != nil {
		return n, fmt.Errorf("getpeername: %w", err)
	}
	return names{Own: addrPort(own), Peer: addrPort(peer)}, nil
}

// prepare sets what must be set before the connect.
func prepare(fd, family int, d Dial) error {
	set := func(level, option, value int) error {
		if value == 0 {
			return nil
		}
		if err := unix.SetsockoptInt(fd, level, option, value); err != nil {
			return fmt.Errorf("setsockopt %d/%d: %w", level, option, err)
		}
		return nil
	}
	reuse, fastOpen := 0, 0
	if d.Reuse {
		reuse = 1
	}
	if len(d.FastOpen) > 0 {
		fastOpen = 1
	}
	if err := errors.Join(
		set(unix.SOL_SOCKET, unix.SO_REUSEADDR, reuse),
		set(unix.SOL_SOCKET, unix.SO_MARK, d.Mark),
		set(unix.SOL_TCP, unix.TCP_FASTOPEN_CONNECT, fastOpen),
	); err != nil {
		return err
	}
	if d.Device != "" {
		if err := unix.BindToDevice(fd, d.Device); err != nil {
			return fmt.Errorf("bind to device %s: %w", d.Device, err)
		}
	}
	if d.Timeout > 0 && !d.NonBlock {
		tv := unix.NsecToTimeval(d.Timeout.Nanoseconds())
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv); err != nil {
			return fmt.Errorf("SO_SNDTIMEO: %w", err)
		}
	}
	if d.From != "" {
		from, err := netip.ParseAddrPort(d.From)
		if err != nil {
			return err
		}
		if err := unix.Bind(fd, sockaddr(family, from)); err != nil {
			return fmt.Errorf("bind %s: %w", from, err)
		}
	}
	return nil
}

// finish waits for the end of a connect in progress.
func finish(fd int, timeout time.Duration) error {
	ms := -1
	if timeout > 0 {
		ms = int(timeout.Milliseconds())
	}
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	n := 0
	err := ignoringEINTR(func() (err error) {
		n, err = unix.Poll(fds, ms)
		return err
	})
	if err != nil {
		return fmt.Errorf("poll: %w", err)
	}
	if n == 0 {
		return unix.EINPROGRESS
	}
	soerr, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && soerr != 0 {
		err = unix.Errno(soerr)
	}
	return err
}

// ignoringEINTR repeats a system call that a signal of Go's own scheduler interrupted. A connect that was interrupted
// goes on by itself: the second one says EALREADY until it is done, then EISCONN.
func ignoringEINTR(f func() error) error {
	for interrupted := false; ; {
		err := f()
		switch {
		case errors.Is(err, unix.EINTR):
			interrupted = true
		case interrupted && errors.Is(err, unix.EALREADY):
			time.Sleep(time.Millisecond)
		case interrupted && errors.Is(err, unix.EISCONN):
			return nil
		default:
			return err
		}
	}
}

func sockaddr(family int, ap netip.AddrPort) unix.Sockaddr {
	if family == unix.AF_INET {
		return &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
	}
	sa := &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ap.Addr().As16()} // As16 of an IPv4 address is its mapped form
	if ifi, err := net.InterfaceByName(ap.Addr().Zone()); err == nil {
		sa.ZoneId = uint32(ifi.Index)
	}
	return sa
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		addr := netip.AddrFrom16(sa.Addr)
		if ifi, err := net.InterfaceByIndex(int(sa.ZoneId)); err == nil {
			addr = addr.WithZone(ifi.Name)
		}
		return netip.AddrPortFrom(addr, uint16(sa.Port))
	}
	return netip.AddrPort{}
}
