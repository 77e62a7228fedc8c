// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"testing"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/test/testnet"
	"github.com/vishvananda/netlink"
)

// addFar puts a host behind the pod, to which the pod forwards, and returns it with its addresses.
func (p *pod) addFar() (far *testnet.Namespace, far4, far6 string) {
	p.t.Helper()
	far = p.net.Namespace("far")
	testnet.Link(p.ns, "eth9", far, "f0")
	p.ns.Addr("eth9", "10.79.0.1/24", "fd79::1/64")
	far.Addr("f0", "10.79.0.2/24", "fd79::2/64")
	far.DefaultRoute("10.79.0.1", "fd79::1")
	for cidr, gw := range map[string]string{"10.79.0.0/24": pod4, "fd79::/64": pod6} {
		_, dst, err := net.ParseCIDR(cidr)
		if err != nil {
			p.t.Fatal(err)
		}
		p.route(p.ext, &netlink.Route{Dst: dst, Gw: net.ParseIP(gw)})
	}
	p.ns.Sysctl("net.ipv4.ip_forward", "1")
	p.ns.Sysctl("net.ipv6.conf.all.forwarding", "1")
	return far, "10.79.0.2", "fd79::2"
}

// TestForwardedTrafficIsLeftAlone is row 15: a host that forwards to a port on which its app listens too. What it forwards
// is none of ours; what is for itself is captured.
func TestForwardedTrafficIsLeftAlone(t *testing.T) {
	t.Parallel()
	// through is the path to the far host's server, on a port on which the app listens as well.
	through := func(p *pod, w path, far *testnet.Namespace, far4, far6 string) path {
		w.name += " to the far host"
		w.to = netip.MustParseAddr(pick(w, far4, far6))
		w.serve = func(network, addr string, handler func(*net.TCPConn)) *testnet.Server {
			app, err := p.app.Listen(network, addr)
			if err != nil {
				p.t.Fatal(err)
			}
			p.t.Cleanup(func() { app.Close() })
			return far.Serve(network, net.JoinHostPort(pick(w, "0.0.0.0", "::"), fmt.Sprint(addrPort(app.Addr()).Port())), handler)
		}
		return w
	}
	t.Run("with the cure", func(t *testing.T) {
		t.Parallel()
		p := newPod(t)
		far, far4, far6 := p.addFar()
		p.init()
		p.startProxy(inside)
		for _, w := range p.ins() {
			p.direct(t, through(p, w, far, far4, far6))
			p.captured(t, w)
		}
		if n := p.counters(t)["in_forwarded"]; n != 3 {
			t.Errorf("%d SYNs to other hosts counted, want 3", n)
		}
	})
	t.Run("without the cure", func(t *testing.T) {
		t.Parallel()
		p := newPod(t)
		far, far4, far6 := p.addFar()
		p.initWithout("forwarded")
		p.startProxy(inside)
		for _, w := range p.ins() {
			p.hangs(t, through(p, w, far, far4, far6))
		}
	})
}

// TestOwnAddresses is row 16: what an app connects to on its own host. To itself and over loopback it is left alone; from
// one address of the host to another it is captured as any other connection.
func TestOwnAddresses(t *testing.T) {
	t.Parallel()
	own := func(p *pod, in path) (self []path, other path) {
		in.clientNS = p.ns
		in.ports, in.direction = config.DialOutbound, "outbound"
		for _, to := range []string{pick(in, "127.0.0.1", "::1"), in.to.String()} {
			w := in.by(p.app, testnet.Dial{})
			w.name = "to " + to
			w.from, w.to = netip.MustParseAddr(to), netip.MustParseAddr(to)
			self = append(self, w)
		}
		other = in.by(p.app, testnet.Dial{From: port0(in, second4, second6)})
		other.name = "from a second address to " + in.to.String()
		other.from = netip.MustParseAddr(pick(in, second4, second6))
		return self, other
	}
	t.Run("with the cure", func(t *testing.T) {
		t.Parallel()
		for _, where := range placements {
			p := newCaptured(t, where)
			for _, in := range p.ins() {
				self, other := own(p, in)
				for _, w := range self {
					p.direct(t, w)
				}
				p.captured(t, other)
			}
		}
	})
	t.Run("without the cure", func(t *testing.T) {
		t.Parallel()
		p := newUncured(t, "own-address", nil)
		for _, in := range p.ins() {
			self, _ := own(p, in)
			for _, w := range self {
				if p.goesDirect(t, w) {
					t.Errorf("%s: left alone, want it to go through the proxy", w.name)
				}
			}
		}
	})
}

// TestTunDevice is row 24: packets of a device without a link header begin with their IP header.
//
// There is no switch: the test was seen to fail (inbound directly, past the proxy) with pln_in on the tun device, by a
// filters() in redirect/ebpf/plan.go that took every device for Ethernet.
func TestTunDevice(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	testnet.TunLink(p.ns, "tun0", p.ext, "tun1")
	p.ns.Addr("tun0", "10.90.0.2/24", "fd90::2/64")
	p.ext.Addr("tun1", "10.90.0.1/24", "fd90::1/64", "10.91.0.1/32", "fd91::1/128")
	for cidr, gw := range map[string]string{"10.91.0.0/24": "10.90.0.1", "fd91::/64": "fd90::1"} {
		_, dst, err := net.ParseCIDR(cidr)
		if err != nil {
			t.Fatal(err)
		}
		p.route(p.ns, &netlink.Route{Dst: dst, Gw: net.ParseIP(gw)})
	}
	p.init("--on-proxy-down", "closed", "--on-proxy-down-inbound", "closed")
	p.startProxy(inside)
	var ways []path
	for _, w := range p.outs() {
		w.from, w.to = netip.MustParseAddr(pick(w, "10.90.0.2", "fd90::2")), netip.MustParseAddr(pick(w, "10.91.0.1", "fd91::1"))
		ways = append(ways, w)
	}
	for _, w := range p.ins() {
		w.from, w.to = netip.MustParseAddr(pick(w, "10.90.0.1", "fd90::1")), netip.MustParseAddr(pick(w, "10.90.0.2", "fd90::2"))
		ways = append(ways, w)
	}
	for _, w := range ways {
		p.captured(t, w)
	}
	p.proxy.Kill() // the reset that answers a SYN has no link header either
	for _, w := range ways[3:] {
		a := p.attempt(w)
		a.wait(t)
		if !errors.Is(a.err, syscall.ECONNREFUSED) {
			t.Errorf("%s: %v, want ECONNREFUSED", w.name, a.err)
		}
	}
}
