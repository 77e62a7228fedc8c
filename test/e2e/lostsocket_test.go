// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/proxy/listen"
	"github.com/pillionproxy/pillion/test/testnet"
	"golang.org/x/sys/unix"
)

// standIn listens where the proxy would, in this test's own process: a proxy that does what a test wants of it. Without
// hosts it listens on both loopback addresses.
func (p *pod) standIn(port uint16, hosts ...string) (accepted <-chan *net.TCPConn, stop func()) {
	p.t.Helper()
	if len(hosts) == 0 {
		hosts = []string{"127.0.0.1", "::1"}
	}
	conns := make(chan *net.TCPConn, 100)
	var listeners []net.Listener
	for _, host := range hosts {
		lc := net.ListenConfig{Control: socketOptions(host, 0)}
		lc.SetMultipathTCP(false)
		var ln net.Listener
		var err error
		p.ns.Do(func() { ln, err = lc.Listen(p.t.Context(), "tcp", net.JoinHostPort(host, fmt.Sprint(port))) })
		if err != nil {
			p.t.Fatal(err)
		}
		listeners = append(listeners, ln)
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				conns <- c.(*net.TCPConn)
			}
		}()
	}
	stop = func() {
		for _, ln := range listeners {
			ln.Close()
		}
	}
	p.t.Cleanup(stop)
	return conns, stop
}

// socketOptions makes a socket transparent, as the proxy's are, and marks it. It has no SO_LINGER: unlike the proxy's, it
// may end without a reset.
func socketOptions(host string, mark uint32) func(_, _ string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) {
			err = errors.Join(
				listen.SetTransparent(int(fd), netip.MustParseAddr(host).Is6()),
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(mark)))
		})
		return errors.Join(cerr, err)
	}
}

// dialInName dials the app as the proxy does: from an address of somebody else.
func (p *pod) dialInName(from, to netip.AddrPort) (c net.Conn, err error) {
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(from), Control: socketOptions(from.Addr().String(), config.Slot(0).Mark(config.RoleDial))}
	d.SetMultipathTCP(false)
	p.ns.Do(func() { c, err = d.DialContext(context.Background(), "tcp", to.String()) })
	return c, err
}

// widow is a connection whose other end was the sidecar's, and is gone without a word.
type widow struct {
	name      string
	ns        *testnet.Namespace
	c         *net.TCPConn
	own, peer netip.AddrPort
	hazard    bool // without the cure nobody tells it
}

// widows makes connections of each kind: the app's, a client's, and the app's end of a dial in a client's name.
func (p *pod) widows(t *testing.T) (all []widow) {
	t.Helper()
	outbound, stopOut := p.standIn(config.PortOutbound)
	inbound, stopIn := p.standIn(config.PortInbound)
	defer stopOut()
	defer stopIn()
	// part ends the connection at the sidecar's end; the other end knows, and has not ended its own stream.
	part := func(name string, sidecar io.ReadWriteCloser, c *net.TCPConn) {
		_, werr := io.WriteString(sidecar, "x")
		rerr := readExactly(c, "x")
		cerr := sidecar.Close()
		n, eerr := c.Read(make([]byte, 1))
		if err := errors.Join(werr, rerr, cerr); err != nil || n != 0 || eerr != io.EOF {
			t.Fatalf("%s: %v, then %d bytes and %v, want the end", name, err, n, eerr)
		}
	}
	for i, w := range p.paths() {
		accepted := make(chan *net.TCPConn, 1)
		hold := make(chan struct{})
		to := w.start(func(c *net.TCPConn) { accepted <- c; <-hold })
		t.Cleanup(func() { close(hold) }) // before the server is closed, which waits for its handlers
		c, err := w.dial(to)
		if err != nil {
			t.Fatalf("%s: %v", w.name, err)
		}
		t.Cleanup(func() { c.Close() })
		own, peer := unmap(c.Own), unmap(c.Peer)
		if w.direction == "outbound" {
			part(w.name, <-outbound, c.TCPConn)
			all = append(all, widow{w.name + ", the app", p.ns, c.TCPConn, own, peer, !w.to.Is6()})
			continue
		}
		part(w.name, <-inbound, c.TCPConn)
		all = append(all, widow{w.name + ", the client", p.ext, c.TCPConn, own, peer, false})
		from := netip.AddrPortFrom(w.from, config.DialInbound.First+uint16(i))
		d, err := p.dialInName(from, to)
		if err != nil {
			t.Fatalf("%s: dial in the client's name: %v", w.name, err)
		}
		app := <-accepted
		part(w.name, d, app)
		all = append(all, widow{w.name + ", the app", p.ns, app, to, from, !w.to.Is6()})
	}
	testnet.Wait(t, "the sidecar's sockets are gone", func() bool {
		for _, s := range p.ns.Sockets() {
			for _, w := range all {
				if unmap(s.Local) == w.peer && unmap(s.Remote) == w.own {
					return false
				}
			}
		}
		return true
	})
	return all
}

// write writes once, and waits until the socket is told that its peer is gone, or repeats itself in vain.
func (w widow) write(t *testing.T) (told bool) {
	t.Helper()
	if _, err := w.c.Write([]byte("more")); err != nil {
		t.Fatalf("%s: the first write: %v; nobody could have told it yet", w.name, err)
	}
	testnet.Wait(t, w.name+" is told, or sends in vain", func() bool {
		for _, s := range w.ns.Sockets() {
			if unmap(s.Local) == w.own && unmap(s.Remote) == w.peer {
				return s.Retransmits > 1
			}
		}
		told = true
		return true
	})
	return told
}

// TestAppWritesToNobody is row 19: where the proxy's socket is gone without a word (an orphan that timed out), a write must
// be answered by a reset, whether a new proxy listens or none. The kernel's own reset has a foreign source address and is
// not routed; without the cure IPv4 apps are never told.
func TestAppWritesToNobody(t *testing.T) {
	t.Parallel()
	for _, next := range []string{"no proxy", "a new proxy"} {
		for _, without := range []string{"", "no-socket"} {
			name := next + "/with the cure"
			if without != "" {
				name = next + "/without the cure"
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				p := newPod(t)
				for _, ns := range []*testnet.Namespace{p.ns, p.ext} {
					ns.Sysctl("net.ipv4.tcp_fin_timeout", "1") // what remains of a closed connection is gone after a second
				}
				p.initWithout(without)
				all := p.widows(t)
				if next == "a new proxy" {
					p.startProxy(inside)
				}
				for _, w := range all {
					told := w.write(t)
					if without != "" && w.hazard {
						if told {
							t.Errorf("%s: was told: there is no hazard", w.name)
						}
						continue
					}
					if !told {
						t.Errorf("%s: sends in vain", w.name)
						continue
					}
					if _, err := w.c.Write([]byte("more")); !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
						t.Errorf("%s: the second write: %v, want EPIPE or ECONNRESET", w.name, err)
					}
				}
			})
		}
	}
}
