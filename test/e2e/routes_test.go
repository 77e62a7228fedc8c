// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/test/testnet"
	"github.com/vishvananda/netlink"
)

// TestRoutesThatVanishAreNoBypass is row 22: somebody takes our routes or rules away. What is captured is unreachable
// then, or is dropped on its way out; it never becomes a direct connection. Init puts it right.
func TestRoutesThatVanishAreNoBypass(t *testing.T) {
	t.Parallel()
	all := func(netlink.Route) bool { return true }
	losses := []struct {
		name   string
		lose   func(p *pod) int
		guards bool // is anything left but the last guard, that on the NIC?
	}{
		{"the routes", func(p *pod) int { return p.removeRoutes(all) }, true},
		{"the routes of NICs", func(p *pod) int { return p.removeRoutes(func(r netlink.Route) bool { return r.LinkIndex != 1 }) }, true},
		{"the rules, but for the guards", func(p *pod) int { return p.removeRules(false) }, true},
		{"all rules", func(p *pod) int { return p.removeRules(false) + p.removeRules(true) }, false},
	}
	type kind struct {
		name string
		dial testnet.Dial
	}
	kinds := func(w path) []kind {
		return []kind{
			{"", testnet.Dial{}},
			{" bound to eth0", testnet.Dial{Device: "eth0"}},
			{" from the second address", testnet.Dial{From: port0(w, second4, second6)}},
			{" with a mark", testnet.Dial{Mark: appMark}},
		}
	}
	try := func(p *pod) (attempts []*attempt) {
		for _, w := range p.outs() {
			for _, k := range kinds(w) {
				w := w.by(p.app, k.dial)
				w.name += k.name
				attempts = append(attempts, p.attempt(w))
			}
		}
		return attempts
	}
	for _, mode := range []string{"hold", "closed"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			p := newPod(t)
			install := func() { p.init("--on-proxy-down", mode) }
			install()
			p.startProxy(inside)
			if mode == "closed" {
				p.proxy.Kill() // what is refused has routes and marks of its own
			}
			for _, loss := range losses {
				t.Run("without "+loss.name, func(t *testing.T) {
					if loss.lose(p) == 0 {
						t.Fatal("there was nothing to remove")
					}
					before := p.counters(t)["guarded"]
					var held int
					for _, a := range try(p) {
						outcome := p.neverDirect(t, a)
						t.Logf("%s: %s", a.w.name, outcome)
						if outcome == "held" {
							held++
						}
						if outcome == "captured" && (mode == "closed" || loss.name != "the routes of NICs") {
							t.Errorf("%s: captured: the loss was none", a.w.name)
						}
					}
					guarded := p.counters(t)["guarded"] - before
					t.Logf("%d held, %d packets dropped on their way out", held, guarded)
					if (held > 0 || !loss.guards) && guarded == 0 {
						t.Errorf("%d connects are held, but no packet was counted as guarded", held)
					}
					if wrong := strings.Join(p.wrong(), ", "); !strings.Contains(wrong, "rule") && !strings.Contains(wrong, "route") {
						t.Errorf("status finds only %q wrong", wrong)
					}
					install()
					if wrong := p.wrong(); len(wrong) > 0 {
						t.Errorf("after init, status finds %q wrong", wrong)
					}
					p.app.Kill() // and its connects
					p.app = p.ns.Agent(p.appCG)
					if mode == "hold" {
						for _, w := range p.paths() {
							p.captured(t, w)
						}
					}
				})
			}
		})
	}
	t.Run("without the cure", func(t *testing.T) {
		t.Parallel()
		p := newUncured(t, "guard", nil)
		p.removeRules(false)
		p.removeRules(true)
		for _, w := range p.outs() {
			for _, k := range kinds(w) {
				if !p.goesDirect(t, w.by(p.app, k.dial)) {
					t.Errorf("%s%s: not direct", w.name, k.name)
				}
			}
		}
	})
}

// TestALiveConnectionSurvivesLostRules is row 22 for connections that are open: nothing of them leaves for the real server
// or the real client, which would answer with a reset. Once init has put the rules back, they go on.
func TestALiveConnectionSurvivesLostRules(t *testing.T) {
	t.Parallel()
	type live struct {
		path
		c *testnet.Conn
	}
	start := func(t *testing.T, p *pod) (all []live) {
		for _, w := range p.paths() {
			c, err := w.dial(w.start(echo(make(chan seen, 1))))
			if err != nil {
				t.Fatalf("%s: %v", w.name, err)
			}
			t.Cleanup(func() { c.Close() })
			_ = c.SetDeadline(time.Now().Add(time.Minute)) // a test that hangs says so
			if err := exchange(c, "before"); err != nil {
				t.Fatalf("%s: %v", w.name, err)
			}
			all = append(all, live{w, c})
		}
		p.removeRules(false)
		p.removeRules(true)
		for _, l := range all {
			if _, err := l.c.Write([]byte("meanwhile")); err != nil {
				t.Errorf("%s: %v", l.name, err)
			}
		}
		return all
	}
	t.Run("with the cure", func(t *testing.T) {
		t.Parallel()
		p := newCaptured(t, inside)
		all := start(t, p)
		for _, l := range all {
			// Outbound it is the client's writing that does not go out, inbound the answer of the app. A packet that is
			// dropped on this very host is not a lost one: TCP waits and tries again, without counting.
			p.ns.WaitSocket(t, l.name+": what the app writes does not go out", func(s testnet.Socket) bool {
				mine := unmap(s.Local) == unmap(l.c.Own)
				if l.direction == "inbound" {
					mine = unmap(s.Local) == unmap(l.c.Peer) && l.ports.Contains(s.Remote.Port())
				}
				return mine && s.Unsent > 0 && s.Timer == testnet.TimerProbe
			})
		}
		if p.counters(t)["guarded"] == 0 {
			t.Error("no packet was counted as guarded")
		}
		p.init()
		for _, l := range all {
			if err := errors.Join(readExactly(l.c, "meanwhile"), exchange(l.c, "after"), finish(l.c.TCPConn)); err != nil {
				t.Errorf("%s: %v", l.name, err)
			}
			if r := p.proxy.waitRecordOf(t, l.c); r.Reason != "ok" {
				t.Errorf("%s: record %+v, want reason ok", l.name, r)
			}
		}
	})
	t.Run("without the cure", func(t *testing.T) {
		t.Parallel()
		p := newUncured(t, "guard", nil)
		all := start(t, p)
		// What left was answered by those who know of no such connection.
		testnet.Wait(t, "the app's end of each connection is gone", func() bool {
			for _, s := range p.ns.Sockets() {
				for _, l := range all {
					out := l.direction == "outbound" && unmap(s.Local) == unmap(l.c.Own)
					in := l.direction == "inbound" && unmap(s.Local) == unmap(l.c.Peer) && l.ports.Contains(s.Remote.Port())
					if (out || in) && s.State == testnet.Established {
						return false
					}
				}
			}
			return true
		})
		p.initWithout("guard")
		for _, l := range all {
			if err := readExactly(l.c, "meanwhile"); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%s: %v, want ECONNRESET", l.name, err)
			}
		}
	})
}

// TestRulesOfOthersAreLeftAlone: rules of others at our priorities are not ours to touch.
func TestRulesOfOthersAreLeftAlone(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	rule := netlink.NewRule()
	rule.Priority, rule.Mark, rule.Table = config.Slot(0).RulePriority()+1, 0x99, 254
	if err := p.ns.Netlink().RuleAdd(rule); err != nil {
		t.Fatal(err)
	}
	p.route(p.ns, &netlink.Route{Gw: parseAddr(client4), Table: config.Slot(0).TableCapture(), Dst: cidr(t, "10.200.0.0/24")})
	before := p.snapshot()
	p.init()
	p.startProxy(inside)
	for _, w := range p.paths() {
		p.captured(t, w)
	}
	p.proxy.Kill()
	must(t, "clean", p.clean())
	same(t, "after clean", before, p.snapshot())
}
