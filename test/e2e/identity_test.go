// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/test/testnet"
	"golang.org/x/sys/unix"
)

// TestAnAppCannotPassForTheProxy is row 12: the proxy is known by who made its socket, not by a mark. An app that may set
// marks, and sets the capture's own, is captured all the same, or gets an error; it never connects directly. What the
// proxy's user makes passes: that is the definition.
//
// There is no switch: the test was seen to fail (directly connected with RoleProxy) with a program that let RoleProxy
// pass in decide() of bpf/capture.bpf.c.
func TestAnAppCannotPassForTheProxy(t *testing.T) {
	t.Parallel()
	for _, where := range placements {
		t.Run(string(where), func(t *testing.T) {
			p := newCaptured(t, where)
			for _, w := range p.outs() {
				for role := config.Role(1); role <= 7; role++ {
					for _, d := range []testnet.Dial{
						{Mark: int(config.Slot(0).Mark(role))},
						{Mark: int(config.Slot(0).Mark(role)) | appMark, Device: "eth0"},
					} {
						outcome := p.neverDirect(t, p.attempt(w.by(p.app, d)))
						t.Logf("%s with role %d, device %q: %s", w.name, role, d.Device, outcome)
						// Two roles lead to lo at once: as the sign of a dial in a client's name, or of one that is refused. What
						// the app gets then is an error.
						if role != config.RoleClosed && role != config.RoleClosedBound && role != config.RoleDial && role != config.RoleDialReply &&
							outcome != "captured" {
							t.Errorf("%s with role %d, device %q: %s, want it captured", w.name, role, d.Device, outcome)
						}
					}
				}
				// From the port range of the proxy's dials in a client's name, which the hook marks for the proxy's user alone.
				from := port(w, pod4, pod6, config.DialInbound.First+5)
				if outcome := p.neverDirect(t, p.attempt(w.by(p.app, testnet.Dial{From: from, Reuse: true}))); outcome != "captured" {
					t.Errorf("%s from %s: %s, want it captured", w.name, from, outcome)
				}
			}
			if where == inside {
				as1666 := p.ns.AgentAs(p.appCG, &testnet.User{UID: 1666, GID: 1666})
				for i, w := range p.outs() {
					p.captured(t, w.by(as1666, testnet.Dial{}))
					p.direct(t, w.by(as1666, testnet.Dial{From: port(w, pod4, pod6, config.DialOutbound.Last-uint16(i))}))
				}
				for _, w := range by(as1666, p.inbound()) {
					p.captured(t, w)
				}
			}
		})
	}
}

// TestTrustedUser: what the user makes whom --trust-proxy-user names passes, from whatever port.
func TestTrustedUser(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.init("--trust-proxy-user")
	p.startProxy(inside)
	as1666 := p.ns.AgentAs(p.appCG, &testnet.User{UID: config.ProxyUID, GID: config.ProxyUID})
	for _, w := range by(as1666, p.paths()) {
		p.direct(t, w)
	}
	p.captured(t, p.outs()[0])
}

// port is an address of the path's family with a port.
func port(w path, v4, v6 string, number uint16) string {
	return netip.AddrPortFrom(netip.MustParseAddr(pick(w, v4, v6)), number).String()
}

// TestWhoseListenerIsIt is row 13: inbound, only listeners that a process of the captured cgroup made are the app's. An
// MPTCP listener, whose own socket the kernel makes, is told by its bind.
//
// There is no switch for either; that an untold listener is passed to directly is what TestListenersOlderThanTheCapture
// sees under --ignore-open-listeners.
func TestWhoseListenerIsIt(t *testing.T) {
	t.Parallel()
	p := newCaptured(t, inside)
	neighbour := p.ns.Agent(p.net.Cgroup("neighbour"))
	for _, w := range p.ins() {
		t.Run(w.name+"/of another cgroup", func(t *testing.T) {
			w := w
			w.serve = neighbour.Serve
			p.direct(t, w)
		})
		t.Run(w.name+"/MPTCP", func(t *testing.T) {
			w := w
			w.serve = p.listeningAs(testnet.Listening{MPTCP: true})
			p.captured(t, w)
		})
		t.Run(w.name+"/MPTCP, with an MPTCP client", func(t *testing.T) {
			testnet.Need(t, testnet.MPTCP)
			w := w.by(p.ext.Agent(nil), testnet.Dial{MPTCP: true})
			w.serve = p.listeningAs(testnet.Listening{MPTCP: true})
			p.captured(t, w)
		})
	}
	if n := p.counters(t)["in_foreign"]; n != 3 {
		t.Errorf("%d SYNs to listeners of others counted, want 3", n)
	}
}

// TestListenersOlderThanTheCapture is row 13: listeners that were open before the hooks were there. Init with the right
// takes them over; without it says so and takes nothing, unless told to leave them.
func TestListenersOlderThanTheCapture(t *testing.T) {
	t.Parallel()
	// older is the inbound paths, each with a server that is there already.
	type older struct {
		path
		to  netip.AddrPort
		saw chan seen
	}
	start := func(p *pod) (all []older) {
		for _, w := range p.ins() {
			o := older{w, netip.AddrPort{}, make(chan seen, 1)}
			o.serve = p.listeningAs(testnet.Listening{Keep: true})
			o.to = o.start(echo(o.saw))
			all = append(all, o)
		}
		return all
	}
	t.Run("with the right", func(t *testing.T) {
		t.Parallel()
		p := newPod(t)
		servers := start(p)
		cmd := p.initCmd()
		cmd.User = nil
		must(t, "init", run(t, cmd))
		p.startProxy(inside)
		for _, o := range servers {
			c, err := o.dial(o.to)
			if err != nil {
				t.Fatal(err)
			}
			p.wentThrough(t, o.path, c, o.to, o.saw)
		}
	})
	t.Run("without the right", func(t *testing.T) {
		t.Parallel()
		p := newPod(t)
		servers := start(p)
		before := p.snapshot()
		r := run(t, p.initCmd())
		wantFault(t, r, r.code, "listeners older than the capture", "CAP_SYS_PTRACE", "--ignore-open-listeners")
		if r.code == 0 {
			t.Error("it ended with 0")
		}
		same(t, "after the refusal", before, p.snapshot())

		p.init("--ignore-open-listeners")
		p.startProxy(inside)
		for _, o := range servers { // uncaptured, as was said
			c, err := o.dial(o.to)
			if err != nil {
				t.Fatal(err)
			}
			if server := <-o.saw; server.peer != unmap(c.Own) || p.proxy.has(c.Own) {
				t.Errorf("%s: the app's peer is %s, want the client itself, %s", o.name, server.peer, c.Own)
			}
			c.Close()
		}
		for _, w := range p.paths() { // and new ones are captured
			p.captured(t, w)
		}
	})
	t.Run("an MPTCP listener", func(t *testing.T) {
		testnet.Need(t, testnet.MPTCP)
		t.Parallel()
		p := newPod(t)
		ln, err := p.app.ListenAs(testnet.Listening{Network: "tcp", Addr: "[::]:0", MPTCP: true, Keep: true})
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		before := p.snapshot()
		cmd := p.initCmd()
		cmd.User = nil // with every right: whose it is stands in a socket that only the kernel has
		r := run(t, cmd)
		if r.code == 0 || !strings.Contains(r.stderr, "MPTCP") {
			t.Errorf("exit code %d, want it refused with its reason\n%s", r.code, r.stderr)
		}
		same(t, "after the refusal", before, p.snapshot())
	})
}

// TestSocketsThatCrossTheCgroup is row 25: it is the cgroup in which a socket was made that counts, not that of the
// process when it connects.
func TestSocketsThatCrossTheCgroup(t *testing.T) {
	t.Parallel()
	p := newCaptured(t, inside)
	other := p.net.Cgroup("other")
	for _, w := range p.outs() {
		family := pick(w, unix.AF_INET, unix.AF_INET6)
		if w.name == "out/mapped" {
			family = unix.AF_INET6
		}
		in, out := p.ns.Agent(other), p.ns.Agent(p.appCG)
		madeOutside, err := in.Socket(family)
		if err != nil {
			t.Fatal(err)
		}
		madeInside, err := out.Socket(family)
		if err != nil {
			t.Fatal(err)
		}
		p.appCG.Add(in.Pid())
		other.Add(out.Pid())
		t.Run(w.name+"/made outside, moved in", func(t *testing.T) { p.direct(t, w.by(in, testnet.Dial{Socket: madeOutside})) })
		t.Run(w.name+"/made inside, moved out", func(t *testing.T) { p.captured(t, w.by(out, testnet.Dial{Socket: madeInside})) })
		t.Run(w.name+"/a new one, moved in", func(t *testing.T) { p.captured(t, w.by(in, testnet.Dial{})) })
		t.Run(w.name+"/a new one, moved out", func(t *testing.T) { p.direct(t, w.by(out, testnet.Dial{})) })
	}
}
