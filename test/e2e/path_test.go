// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/test/testnet"
)

// path is one way through the sidecar: who connects, who is connected to, and by which addresses.
type path struct {
	name      string
	direction string           // as the access log calls it
	from, to  netip.Addr       // true addresses of client and server
	ports     config.PortRange // from which the proxy dials on this path
	clientNS  *testnet.Namespace

	serveNet, serveHost string
	port                uint16 // to serve at; 0: any
	serve               func(network, addr string, handler func(*net.TCPConn)) *testnet.Server
	dial                func(to netip.AddrPort) (*testnet.Conn, error)
}

// paths are both directions in each family. A v4-mapped path has an IPv6 socket at the app's end and IPv4 packets.
func (p *pod) paths() []path {
	appDial := func(mapped bool) func(netip.AddrPort) (*testnet.Conn, error) {
		return func(to netip.AddrPort) (*testnet.Conn, error) {
			return p.app.Dial(testnet.Dial{To: to.String(), Mapped: mapped})
		}
	}
	clientDial := func(to netip.AddrPort) (*testnet.Conn, error) {
		c, err := p.ext.Dial("tcp", to.String())
		if err != nil {
			return nil, err
		}
		return &testnet.Conn{TCPConn: c, Own: addrPort(c.LocalAddr()), Peer: addrPort(c.RemoteAddr())}, nil
	}
	out := func(name, from, to, network, host string, mapped bool) path {
		return path{
			name: "out/" + name, direction: "outbound", from: netip.MustParseAddr(from), to: netip.MustParseAddr(to),
			ports: config.DialOutbound, clientNS: p.ns, serveNet: network, serveHost: host, serve: p.ext.Serve, dial: appDial(mapped),
		}
	}
	in := func(name, from, to, network, host string) path {
		return path{
			name: "in/" + name, direction: "inbound", from: netip.MustParseAddr(from), to: netip.MustParseAddr(to),
			ports: config.DialInbound, clientNS: p.ext, serveNet: network, serveHost: host, serve: p.app.Serve, dial: clientDial,
		}
	}
	return []path{
		out("v4", pod4, server4, "tcp4", "0.0.0.0", false),
		out("v6", pod6, server6, "tcp6", "::", false),
		out("mapped", pod4, server4, "tcp4", "0.0.0.0", true),
		in("v4", client4, pod4, "tcp4", "0.0.0.0"),
		in("v6", client6, pod6, "tcp6", "::"),
		in("mapped", client4, pod4, "tcp", "::"),
	}
}

// start serves at a port of its own and returns the address to connect to.
func (w path) start(handler func(*net.TCPConn)) netip.AddrPort {
	_, to := w.server(handler)
	return to
}

// server is start, for servers that are closed before the test ends.
func (w path) server(handler func(*net.TCPConn)) (*testnet.Server, netip.AddrPort) {
	s := w.serve(w.serveNet, net.JoinHostPort(w.serveHost, fmt.Sprint(w.port)), handler)
	return s, netip.AddrPortFrom(w.to, s.Addr.Port())
}

// seen is what a server's end of a connection says of itself, in the order own, peer.
type seen struct{ own, peer netip.AddrPort }

// echo serves one exchange after the other on a connection, after telling whom it sees.
func echo(saw chan<- seen) func(*net.TCPConn) {
	return func(c *net.TCPConn) {
		saw <- seen{unmap(addrPort(c.LocalAddr())), unmap(addrPort(c.RemoteAddr()))}
		_, _ = io.Copy(c, c)
	}
}

// exchange sends a message and wants it back.
func exchange(c io.ReadWriter, message string) error {
	if _, err := io.WriteString(c, message); err != nil {
		return err
	}
	b := make([]byte, len(message))
	if _, err := io.ReadFull(c, b); err != nil {
		return fmt.Errorf("answer: %w", err)
	}
	if string(b) != message {
		return fmt.Errorf("answer %q to %q", b, message)
	}
	return nil
}

// finish closes our direction, wants the end of the other one, and closes.
func finish(c *net.TCPConn) error {
	if err := c.CloseWrite(); err != nil {
		return err
	}
	n, err := io.Copy(io.Discard, c)
	if n != 0 {
		return fmt.Errorf("%d bytes where the end was expected", n)
	}
	if err != nil {
		return fmt.Errorf("in place of the end: %w", err)
	}
	return c.Close()
}

// captured connects once over the path and checks that the connection went through the sidecar, whole, and that each of
// the four ends saw true addresses.
func (p *pod) captured(t *testing.T, w path) {
	t.Helper()
	saw := make(chan seen, 1)
	server, to := w.server(echo(saw))
	defer server.Close()
	c, err := w.dial(to)
	if err != nil {
		t.Fatalf("%s: %v", w.name, err)
	}
	p.wentThrough(t, w, c, to, saw)
}

// wentThrough is captured, for a connection that there is already; it ends it.
func (p *pod) wentThrough(t *testing.T, w path, c *testnet.Conn, to netip.AddrPort, saw <-chan seen) {
	t.Helper()
	defer c.Close()
	if err := errors.Join(exchange(c, "through the sidecar"), finish(c.TCPConn)); err != nil {
		t.Fatalf("%s: %v", w.name, err)
	}
	r, server := p.proxy.waitRecordOf(t, c), <-saw
	t.Logf("%-10s client: own %s peer %s | proxy: source %s destination %s upstream %s | server: own %s peer %s",
		w.name, c.Own, c.Peer, r.Source, r.Destination, r.Upstream, server.own, server.peer)
	for _, check := range []struct {
		what      string
		got, want any
	}{
		{"the client's own address", c.Own.Addr().Unmap(), w.from},
		{"the client's peer", unmap(c.Peer), to},
		{"the source that the proxy saw", r.Source, unmap(c.Own)},
		{"the destination that the proxy saw", r.Destination, to},
		{"the server's own address", server.own, to},
		{"the server's peer", server.peer.Addr(), w.from},
		{"the server's peer is the proxy's dial", server.peer, r.Upstream},
		{"that dial's port is in the proxy's range", w.ports.Contains(server.peer.Port()), true},
		{"direction", r.Direction, w.direction},
		{"reason", r.Reason, "ok"},
		{"bytes sent", r.Sent, int64(len("through the sidecar"))},
		{"bytes received", r.Received, int64(len("through the sidecar"))},
	} {
		if check.got != check.want {
			t.Errorf("%s: %s: %v, want %v", w.name, check.what, check.got, check.want)
		}
	}
}

// direct connects once over the path and checks that no sidecar had a part in it.
func (p *pod) direct(t *testing.T, w path) {
	t.Helper()
	saw := make(chan seen, 1)
	server, to := w.server(echo(saw))
	defer server.Close()
	c, err := w.dial(to)
	if err != nil {
		t.Fatalf("%s: %v", w.name, err)
	}
	defer c.Close()
	if err := errors.Join(exchange(c, "direct"), finish(c.TCPConn)); err != nil {
		t.Fatalf("%s: %v", w.name, err)
	}
	if server := <-saw; server.peer != unmap(c.Own) {
		t.Errorf("%s: the server's peer is %s, want the client's own socket %s", w.name, server.peer, c.Own)
	}
	if p.proxy != nil && p.proxy.hasConn(c) {
		t.Errorf("%s: the proxy recorded a connection that should not have been captured, from %s", w.name, c.Own)
	}
}
