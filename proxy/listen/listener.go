// SPDX-License-Identifier: Apache-2.0

package listen

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/pillionproxy/pillion/config"
	"golang.org/x/sys/unix"
)

const (
	// borrowed is how long a port that is in use is tried again. The check that `pillion init` makes at its end listens on
	// the proxy's ports for some milliseconds.
	borrowed     = 2 * time.Second
	borrowedStep = 20 * time.Millisecond
	// pickAttempts bounds the search for a port that is free in both families.
	pickAttempts = 64
)

// Listener is one of the proxy's listeners: a port on 127.0.0.1 and on ::1. Close may be called more than once.
type Listener struct {
	port    uint16
	sockets []*net.TCPListener // IPv4, then IPv6 if there is IPv6
}

// Open listens on the port. Port 0 is a free one for which usable, called with it, returns true. The error is a
// *config.Fault. On a host without IPv6 the listener has IPv4 alone; HasIPv6 tells.
func Open(port uint16, usable func(uint16) bool) (*Listener, error) {
	if port != 0 {
		return openFixed(port)
	}
	for range pickAttempts {
		l, err := open(0)
		switch {
		case errors.Is(err, unix.EADDRINUSE): // free in IPv4, not in IPv6
		case err != nil:
			return nil, fault(0, err)
		case usable(l.port):
			return l, nil
		default:
			l.Close()
		}
	}
	return nil, &config.Fault{
		Err:  errors.New("listen on loopback: found no free port outside the dial ranges"),
		Hint: "widen net.ipv4.ip_local_port_range, or name the listeners' ports",
	}
}

func openFixed(port uint16) (*Listener, error) {
	for end := time.Now().Add(borrowed); ; time.Sleep(borrowedStep) {
		l, err := open(port)
		if err == nil {
			return l, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) || time.Now().After(end) {
			return nil, fault(port, err)
		}
	}
}

func fault(port uint16, err error) error {
	f := &config.Fault{Err: fmt.Errorf("listen on port %d of loopback: %w", port, err)}
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		f.Hint = fmt.Sprintf("another process listens there (see `ss -ltnp sport = :%d`); end it, or give init and proxy other ports", port)
	case errors.Is(err, unix.EPERM):
		f.Hint = "the proxy needs CAP_NET_RAW for transparent sockets: run it as root, or with that capability ambient (AmbientCapabilities= in systemd, capabilities.add in Kubernetes)"
		f.Exit = config.ExitNoPerm
	case errors.Is(err, unix.EACCES):
		f.Hint = "ports below 1024 take CAP_NET_BIND_SERVICE; choose others"
		f.Exit = config.ExitNoPerm
	}
	return f
}

// open listens on both families, or on IPv4 alone where there is no IPv6.
func open(port uint16) (*Listener, error) {
	v4, err := listen(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)
	if err != nil {
		return nil, err
	}
	l := &Listener{port: addrPort(v4.Addr()).Port(), sockets: []*net.TCPListener{v4}}
	v6, err := listen(netip.IPv6Loopback(), l.port)
	switch {
	case err == nil:
		l.sockets = append(l.sockets, v6)
	case errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.EADDRNOTAVAIL):
		// Without ::1 nothing can be captured: the capture gives IPv6 connections to a listener there.
	default:
		l.Close()
		return nil, err
	}
	return l, nil
}

func listen(addr netip.Addr, port uint16) (*net.TCPListener, error) {
	lc := net.ListenConfig{
		KeepAlive: -1, // SetCommon does it, once for all accepted sockets
		Control:   func(_, _ string, c syscall.RawConn) error { return control(c, addr.Is6()) },
	}
	lc.SetMultipathTCP(false) // an MPTCP listener cannot be given a connection
	network := "tcp4"
	if addr.Is6() {
		network = "tcp6"
	}
	l, err := lc.Listen(context.Background(), network, netip.AddrPortFrom(addr, port).String())
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

// control sets the options in the order of what each needs: transparent before bind, all before listen, since accepted
// sockets inherit them. SO_MARK stays 0: it would be inherited too, and taken for the app's.
func control(c syscall.RawConn, v6 bool) error {
	var err error
	cerr := c.Control(func(fd uintptr) {
		if err = SetTransparent(int(fd), v6); err != nil {
			return
		}
		if err = setPacketInfo(int(fd), v6); err != nil {
			return
		}
		err = SetCommon(int(fd))
	})
	return errors.Join(cerr, err)
}

// Port is the port that is listened on.
func (l *Listener) Port() uint16 { return l.port }

// HasIPv6 reports whether ::1 is listened on, beside 127.0.0.1.
func (l *Listener) HasIPv6() bool { return len(l.sockets) > 1 }

// Close ends the listener. Connections that were not accepted yet are reset.
func (l *Listener) Close() {
	for _, s := range l.sockets {
		_ = s.Close() // fails only if it was closed before
	}
}

// Accepter is told what a listener accepts. Its methods are called from the listener's goroutines, one per family, which
// accept nothing else meanwhile: they must not wait.
type Accepter interface {
	// Accepted takes over the connection.
	Accepted(*Conn)
	// Failing says that no connection can be accepted now, for want of descriptors or memory.
	Failing(error)
	// Room is received from when it is worth trying again.
	Room() <-chan struct{}
}

// Serve accepts until Close.
func (l *Listener) Serve(a Accepter) {
	var wg sync.WaitGroup
	for _, s := range l.sockets {
		wg.Go(func() { accept(s, a) })
	}
	wg.Wait()
}

// retryAccept is when an accept that failed is tried again even if no connection has closed: the descriptors may have
// been used up by somebody else.
const retryAccept = 100 * time.Millisecond

func accept(l *net.TCPListener, a Accepter) {
	for {
		tcp, err := l.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			a.Failing(err)
			select {
			case <-a.Room():
			case <-time.After(retryAccept):
			}
			continue
		}
		c, err := NewConn(tcp)
		if err != nil {
			_ = tcp.Close() // SyscallConn of an open connection does not fail
			continue
		}
		a.Accepted(c)
	}
}
