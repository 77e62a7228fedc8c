// SPDX-License-Identifier: Apache-2.0

package listen

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/proxy/loop"
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

// Kind says what sockets a listener has.
type Kind struct {
	// Any: 0.0.0.0 and [::], else 127.0.0.1 and ::1.
	Any bool
	// Transparent: it can be given connections to addresses that are not this host's. That takes CAP_NET_RAW.
	Transparent bool
}

// KindOf is the kind of listener that is asked for, as far as this process may have it.
func KindOf(l config.Listen) Kind {
	switch l {
	case config.ListenLoopback:
		return Kind{Transparent: true}
	case config.ListenAny:
		return Kind{Any: true, Transparent: mayBeTransparent()}
	default:
		may := mayBeTransparent()
		return Kind{Any: !may, Transparent: may}
	}
}

func (k Kind) addresses() (v4, v6 netip.Addr) {
	if k.Any {
		return netip.IPv4Unspecified(), netip.IPv6Unspecified()
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()
}

func (k Kind) String() string {
	if k.Any {
		return "any address"
	}
	return "loopback"
}

// Listener is one of the proxy's listeners: a port, in both families. Close may be called more than once.
type Listener struct {
	kind    Kind
	port    uint16
	sockets []*net.TCPListener // IPv4, then IPv6 if there is IPv6; closed once it serves
	serving []*loop.Listener
}

// Open listens on the port. Port 0 is a free one for which usable, called with it, returns true. The error is a
// *config.Fault. On a host without IPv6 the listener has IPv4 alone; HasIPv6 tells.
func Open(kind Kind, port uint16, usable func(uint16) bool) (*Listener, error) {
	if port != 0 {
		return openFixed(kind, port)
	}
	for range pickAttempts {
		l, err := open(kind, 0)
		switch {
		case errors.Is(err, unix.EADDRINUSE): // free in IPv4, not in IPv6
		case err != nil:
			return nil, fault(kind, 0, err)
		case usable(l.port):
			return l, nil
		default:
			l.Close()
		}
	}
	return nil, &config.Fault{
		Err:  fmt.Errorf("listen on %s: found no free port outside the dial ranges", kind),
		Hint: "widen net.ipv4.ip_local_port_range, or name the listeners' ports",
	}
}

func openFixed(kind Kind, port uint16) (*Listener, error) {
	for end := time.Now().Add(borrowed); ; time.Sleep(borrowedStep) {
		l, err := open(kind, port)
		if err == nil {
			return l, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) || time.Now().After(end) {
			return nil, fault(kind, port, err)
		}
	}
}

func fault(where fmt.Stringer, port uint16, err error) error {
	f := &config.Fault{Err: fmt.Errorf("listen on port %d of %s: %w", port, where, err)}
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		f.Hint = fmt.Sprintf("another process listens there (see `ss -ltnp sport = :%d`); end it, or give init and proxy other ports", port)
	case errors.Is(err, unix.EPERM):
		f.Hint = "transparent sockets take CAP_NET_RAW: run the proxy as root, or with that capability ambient (AmbientCapabilities= in systemd, capabilities.add in Kubernetes, setpriv --ambient-caps +net_raw --inh-caps +net_raw); the backend redirect needs none: --listen auto, or any"
		f.Exit = config.ExitNoPerm
	case errors.Is(err, unix.EADDRNOTAVAIL):
		f.Hint = "`ip address` shows the addresses of this host"
		f.Exit = config.ExitConfig
	case errors.Is(err, unix.EACCES):
		f.Hint = "ports below 1024 take CAP_NET_BIND_SERVICE; choose others"
		f.Exit = config.ExitNoPerm
	}
	return f
}

// OpenAt listens on one address alone. The error is a *config.Fault.
func OpenAt(addr netip.AddrPort) (*Listener, error) {
	var k Kind
	socket, err := k.listen(addr.Addr(), addr.Port())
	if err != nil {
		return nil, fault(addr.Addr(), addr.Port(), err)
	}
	return &Listener{kind: k, port: addrPort(socket.Addr()).Port(), sockets: []*net.TCPListener{socket}}, nil
}

// Adopt makes a Listener of sockets that listen already, in a network namespace of their own maybe: those of Files, in their
// order. It closes the files.
func Adopt(kind Kind, files []*os.File) (*Listener, error) {
	l := &Listener{kind: kind}
	for _, f := range files {
		socket, err := net.FileListener(f)
		_ = f.Close()
		if err != nil {
			l.Close()
			return nil, fmt.Errorf("take over a listener: %w", err)
		}
		tcp, ok := socket.(*net.TCPListener)
		if !ok {
			_ = socket.Close()
			l.Close()
			return nil, fmt.Errorf("take over a listener: a %s is none of TCP", socket.Addr().Network())
		}
		l.sockets, l.port = append(l.sockets, tcp), addrPort(tcp.Addr()).Port()
	}
	return l, nil
}

// Files are copies of the listener's sockets, for another process. The caller closes them.
func (l *Listener) Files() (files []*os.File, err error) {
	for _, s := range l.sockets {
		f, err := s.File()
		if err != nil {
			return files, err
		}
		files = append(files, f)
	}
	return files, nil
}

// open listens on both families, or on IPv4 alone where there is no IPv6.
func open(kind Kind, port uint16) (*Listener, error) {
	addr4, addr6 := kind.addresses()
	v4, err := kind.listen(addr4, port)
	if err != nil {
		return nil, err
	}
	l := &Listener{kind: kind, port: addrPort(v4.Addr()).Port(), sockets: []*net.TCPListener{v4}}
	v6, err := kind.listen(addr6, l.port)
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

func (k Kind) listen(addr netip.Addr, port uint16) (*net.TCPListener, error) {
	lc := net.ListenConfig{
		KeepAlive: -1, // SetKeepalive does it, once for all accepted sockets
		Control:   func(_, _ string, c syscall.RawConn) error { return k.control(c, addr.Is6()) },
	}
	lc.SetMultipathTCP(false) // an MPTCP listener cannot be given a connection
	network := "tcp4"
	if addr.Is6() {
		network = "tcp6" // IPV6_V6ONLY: an IPv4 connection is always that of an IPv4 socket
	}
	l, err := lc.Listen(context.Background(), network, netip.AddrPortFrom(addr, port).String())
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

// control sets the options in the order of what each needs: transparent before bind, all before listen, since accepted
// sockets inherit them. SO_MARK stays 0: it would be inherited too, and taken for the app's.
func (k Kind) control(c syscall.RawConn, v6 bool) error {
	var err error
	cerr := c.Control(func(fd uintptr) {
		if k.Transparent {
			if err = SetTransparent(int(fd), v6); err != nil {
				return
			}
		}
		if err = setPacketInfo(int(fd), v6); err != nil {
			return
		}
		err = errors.Join(loop.SetStream(int(fd)), SetKeepalive(int(fd)))
	})
	return errors.Join(cerr, err)
}

// Port is the port that is listened on.
func (l *Listener) Port() uint16 { return l.port }

// Kind is what it was opened as.
func (l *Listener) Kind() Kind { return l.kind }

// HasIPv6 reports whether there is a socket for IPv6, beside that for IPv4.
func (l *Listener) HasIPv6() bool { return len(l.sockets) > 1 }

// At reports whether who connects to the address comes to this listener, captured or not.
func (l *Listener) At(a netip.AddrPort) bool {
	return a.Port() == l.port && (a.Addr().IsLoopback() || l.kind.Any && IsOwn(a.Addr()))
}

// Close ends the listener, and waits until nothing more is accepted. Connections that were not accepted yet are reset.
func (l *Listener) Close() {
	for _, s := range l.serving {
		s.Close()
	}
	for _, s := range l.sockets {
		_ = s.Close() // fails only if it was closed before, as Serve does
	}
}

// Accepter is told what a listener accepts, on the loop whose connection it is. Its methods must not wait.
type Accepter interface {
	// Accepted takes over the connection.
	Accepted(*Conn)
	// Failing says that no connection can be accepted now, for want of descriptors or memory.
	Failing(error)
}

// Serve accepts from now on, until Close. It is called once; after an error the listener is to be closed.
func (l *Listener) Serve(g *loop.Group, a Accepter) error {
	for _, s := range l.sockets {
		serving, err := g.Serve(s, func(c *loop.Conn, from netip.AddrPort) { a.Accepted(accepted(c, from, l.port)) }, a.Failing)
		if err != nil {
			return fmt.Errorf("accept connections: %w", err)
		}
		l.serving = append(l.serving, serving)
	}
	return nil
}
