// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/test/testnet"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestBoundSocketsLeaveByTheirNIC is row 9: an app that binds to a device, or to an address, is captured, and its
// connection leaves by the NIC and from the address that it would have had without us. How that is, an agent outside of
// the cgroup tells with the same socket.
func TestBoundSocketsLeaveByTheirNIC(t *testing.T) {
	t.Parallel()
	for _, where := range placements {
		t.Run(string(where), func(t *testing.T) {
			t.Parallel()
			p := newPod(t)
			p.addNIC()
			p.init()
			p.startProxy(where)
			neighbour := p.ns.Agent(p.net.Cgroup("neighbour"))
			for _, w := range p.outs() {
				for _, tt := range []struct {
					name, nic string
					dial      testnet.Dial
				}{
					{"not bound", "v0", testnet.Dial{}},
					{"to the second address", "v0", testnet.Dial{From: port0(w, second4, second6)}},
					{"to eth0", "v0", testnet.Dial{Device: "eth0"}},
					{"to eth1", "v1", testnet.Dial{Device: "eth1"}},
					{"to eth1 and its address", "v1", testnet.Dial{Device: "eth1", From: port0(w, other4, other6)}},
					{"to the address of eth1 alone", "v0", testnet.Dial{From: port0(w, other4, other6)}},
				} {
					t.Run(w.name+"/"+tt.name, func(t *testing.T) {
						w, nic := p.onNIC(w)
						p.direct(t, w.by(neighbour, tt.dial))
						if got := <-nic; got != tt.nic {
							t.Fatalf("without us it comes by %s, want %s: this test is wrong", got, tt.nic)
						}
						w = w.by(p.app, tt.dial)
						w.from = netip.MustParseAddr(sourceOf(w, tt.dial))
						p.captured(t, w)
						if got := <-nic; got != tt.nic {
							t.Errorf("the proxy's dial left by %s, want %s", got, tt.nic)
						}
					})
				}
			}
		})
	}
	// The cure is one route for each device. There is no switch for it: it is taken out by removing them, and the guard
	// that would hold the connection then (row 22) by its switch and its rules.
	t.Run("without the cure", func(t *testing.T) {
		t.Parallel()
		p := newUncured(t, "guard", (*pod).addNIC)
		p.removeRoutes(func(r netlink.Route) bool { return r.LinkIndex != 1 })
		p.removeRules(true)
		for _, w := range p.outs() {
			w, nic := p.onNIC(w.by(p.app, testnet.Dial{Device: "eth1"}))
			if !p.goesDirect(t, w) {
				t.Errorf("%s: not direct", w.name)
			}
			if got := <-nic; got != "v1" {
				t.Errorf("%s: by %s", w.name, got)
			}
		}
	})
}

// port0 is an address of the path's family, with no port.
func port0(w path, v4, v6 string) string { return net.JoinHostPort(pick(w, v4, v6), "0") }

// sourceOf is the address that a socket gets which is bound so.
func sourceOf(w path, d testnet.Dial) string {
	switch {
	case d.From != "":
		return netip.MustParseAddrPort(d.From).Addr().String()
	case d.Device == "eth1":
		return pick(w, other4, other6)
	}
	return pick(w, pod4, pod6)
}

// TestSamePortBoundToADevice is row 10, with the worst of row 1: a source port used again and again on a socket that is
// bound to a device, against a server that closes first. The challenged SYN's answer must find the way to the app, though
// its socket cannot be seen from lo.
func TestSamePortBoundToADevice(t *testing.T) {
	t.Parallel()
	const times = 20
	for _, tt := range []struct {
		name    string
		install func(p *pod)
	}{
		{"with the two capabilities", func(p *pod) { p.init() }},
		{"with all, and the faster way", func(p *pod) {
			cmd := p.initCmd()
			cmd.User = nil
			must(p.t, "init", run(p.t, cmd))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t)
			p.addNIC()
			tt.install(p)
			p.startProxy(inside)
			for i, w := range p.outs() {
				s := p.sameSocket(w, i)
				for range times {
					if err := <-s.again(); err != nil {
						t.Fatalf("%s: %v", w.name, err)
					}
				}
			}
			if n := p.counters(t)["lo_challenged"]; n < times {
				t.Errorf("%d SYNs met a TIME_WAIT, want most of %d: this test shows little", n, 3*times)
			}
		})
	}
	t.Run("without the cure", func(t *testing.T) {
		t.Parallel()
		p := newUncured(t, "direction", (*pod).addNIC)
		for i, w := range p.outs() {
			s := p.sameSocket(w, i)
			hung := false
			for n := 0; n < times && !hung; n++ {
				done := s.again()
				select {
				case err := <-done:
					hung = err != nil
				case <-time.After(500 * time.Millisecond): // slow, or hanging: the socket says which
					testnet.Wait(t, w.name+": the exchange ends, or its SYN is repeated", func() bool {
						select {
						case err := <-done:
							hung = err != nil
							return true
						default:
						}
						hung = p.repeats(w, s.to)
						return hung
					})
				}
			}
			if !hung {
				t.Errorf("%s: %d connections from one port, and none hung", w.name, times)
			}
		}
	})
}

// sameSocket connects with the same options from the same port each time.
type sameSocket struct {
	p    *pod
	w    path
	dial testnet.Dial
	to   netip.AddrPort
}

func (p *pod) sameSocket(w path, i int) *sameSocket {
	to := w.start(func(c *net.TCPConn) {
		if readExactly(c, "x") == nil {
			_, _ = c.Write([]byte("y"))
		}
		_ = c.CloseWrite()
		_, _ = c.Read(make([]byte, 1)) // the end of the app, which comes second
	})
	from := net.JoinHostPort(pick(w, other4, other6), fmt.Sprint(21500+i))
	return &sameSocket{p, w, testnet.Dial{To: to.String(), Mapped: w.name == "out/mapped", Device: "eth1", From: from, Reuse: true}, to}
}

// again makes one exchange that the server ends.
func (s *sameSocket) again() <-chan error {
	done := make(chan error, 1)
	go func() {
		c, err := s.p.app.Dial(s.dial)
		if err == nil {
			defer c.Close()
			if _, err = c.Write([]byte("x")); err == nil {
				err = readExactly(c, "y")
			}
		}
		if err == nil {
			err = finish(c.TCPConn)
		}
		done <- err
	}()
	return done
}

// TestListenersBoundToADevice is row 10, inbound: listeners that take connections from one device only.
func TestListenersBoundToADevice(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.addNIC()
	p.init()
	p.startProxy(inside)
	for _, w := range p.ins() {
		for _, device := range []string{"eth0", "eth1"} {
			t.Run(w.name+"/"+device, func(t *testing.T) {
				w := w
				if device == "eth1" {
					w.from, w.to = netip.MustParseAddr(pick(w, beyond4, beyond6)), netip.MustParseAddr(pick(w, other4, other6))
				}
				w.serve = p.listeningAs(testnet.Listening{Device: device})
				p.captured(t, w)
			})
		}
	}
}

// listeningAs is how a path serves with an app's listener that has options of its own.
func (p *pod) listeningAs(l testnet.Listening) func(network, addr string, handler func(*net.TCPConn)) *testnet.Server {
	return func(network, addr string, handler func(*net.TCPConn)) *testnet.Server {
		p.t.Helper()
		l := l
		l.Network, l.Addr = network, addr
		ln, err := p.app.ListenAs(l)
		if err != nil {
			p.t.Fatalf("listen %+v: %v", l, err)
		}
		return testnet.Serve(p.t, ln, handler)
	}
}

// TestLinkLocal is row 10 for fe80::/10: such sockets are bound to their interface by their address.
func TestLinkLocal(t *testing.T) {
	t.Parallel()
	// As wentThrough, but that each process has a zone of its own for the same address.
	cured := func(t *testing.T, p *pod, w path) {
		saw := make(chan seen, 1)
		to := w.start(echo(saw))
		c, err := w.dial(to)
		if err == nil {
			err = errors.Join(exchange(c, "through the sidecar"), finish(c.TCPConn))
		}
		if err != nil {
			t.Fatal(err)
		}
		r := p.proxy.waitRecord(t, netip.AddrPortFrom(c.Own.Addr().WithZone("eth0"), c.Own.Port()))
		got := []netip.AddrPort{noZone(r.Source), noZone(r.Destination), noZone(r.Upstream)}
		server := <-saw
		want := []netip.AddrPort{noZone(c.Own), noZone(c.Peer), noZone(server.peer)}
		if !slices.Equal(got, want) || noZone(server.own) != want[1] || want[0].Addr() != w.from || want[1].Addr() != w.to ||
			want[2].Addr() != w.from || !w.ports.Contains(want[2].Port()) || r.Reason != "ok" {
			t.Errorf("the proxy saw source, destination, upstream %s; the two ends saw %s, and the server was %s", got, want, server.own)
		}
	}
	for _, tt := range []struct {
		name, without string
		check         func(*testing.T, *pod, path)
	}{
		{"with the cure", "", cured},
		// Its packets after the SYN are taken for orphans, and reset.
		{"without the cure", "link-local", func(t *testing.T, p *pod, w path) {
			saw := make(chan seen, 1)
			c, err := w.dial(w.start(echo(saw)))
			if err == nil {
				defer c.Close()
				err = exchange(c, "through the sidecar")
			}
			if err == nil {
				t.Error("it works")
			}
			t.Log(err)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := newUncured(t, tt.without, nil)
			world := p.ext.Agent(nil)
			here, there := p.ns.LinkLocal("eth0"), p.ext.LinkLocal("v0")
			out, in := p.paths()[1], p.paths()[4]
			out.from, out.to = netip.MustParseAddr(here).WithZone(""), netip.MustParseAddr(there).WithZone("")
			out.serve, out.serveHost = world.Serve, there
			out.dial = func(to netip.AddrPort) (*testnet.Conn, error) {
				return p.app.Dial(testnet.Dial{To: netip.AddrPortFrom(out.to.WithZone("eth0"), to.Port()).String()})
			}
			in.from, in.to = out.to, out.from
			in.serve, in.serveHost = p.app.Serve, here
			in.dial = func(to netip.AddrPort) (*testnet.Conn, error) {
				return world.Dial(testnet.Dial{To: netip.AddrPortFrom(in.to.WithZone("v0"), to.Port()).String()})
			}
			for _, w := range []path{out, in} {
				t.Run(w.name, func(t *testing.T) { tt.check(t, p, w) })
			}
		})
	}
}

func noZone(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().WithZone(""), a.Port())
}

// removeRoutes takes those routes out of the capture's table that match.
func (p *pod) removeRoutes(match func(netlink.Route) bool) (removed int) {
	p.t.Helper()
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := p.ns.Netlink().RouteListFiltered(family, &netlink.Route{Table: config.Slot(0).TableCapture()}, netlink.RT_FILTER_TABLE)
		if err != nil {
			p.t.Fatal(err)
		}
		for _, r := range routes {
			if !match(r) {
				continue
			}
			if err := p.ns.Netlink().RouteDel(&r); err != nil {
				p.t.Fatalf("remove %s: %v", r, err)
			}
			removed++
		}
	}
	return removed
}

// removeRules takes the rules of slot 0 away: those that lead to a table, or the guards behind them.
func (p *pod) removeRules(guards bool) (removed int) {
	p.t.Helper()
	first := config.Slot(0).RulePriority()
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := p.ns.Netlink().RuleList(family)
		if err != nil {
			p.t.Fatal(err)
		}
		for _, r := range rules {
			if r.Priority < first || r.Priority >= first+10 || (r.Table <= 0) != guards {
				continue
			}
			r.Family = family
			if r.Table < 0 {
				r.Table = 0
			}
			if err := p.ns.Netlink().RuleDel(&r); err != nil {
				p.t.Fatalf("remove %s: %v", r, err)
			}
			removed++
		}
	}
	return removed
}
