// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/pillionproxy/pillion/test/testnet"
	"golang.org/x/sys/unix"
)

// form is how init ends a TIME_WAIT that a SYN meets.
type form string

const (
	challenge form = "challenge"            // what the two capabilities allow
	fast      form = "fast, by CAP_PERFMON" // kernel memory may be read
)

// initForm installs the capture in the given form, with cures taken out.
func (p *pod) initForm(f form, without string, args ...string) {
	p.t.Helper()
	cmd := p.initCmd(args...)
	if f == fast {
		cmd.User.Caps = append(cmd.User.Caps, unix.CAP_PERFMON)
	}
	cmd.Env = append(os.Environ(), "PILLION_TEST_WITHOUT="+without)
	must(p.t, "init", run(p.t, cmd))
}

// TestSourcePortUsedAgain: a client that binds one source port, again and again, to a server that closes first meets the
// TIME_WAIT of the proxy's end each time. Row 1.
func TestSourcePortUsedAgain(t *testing.T) {
	t.Parallel()
	for _, f := range []form{challenge, fast} {
		t.Run(string(f), func(t *testing.T) {
			t.Parallel()
			p := newPod(t)
			p.initForm(f, "")
			p.startProxy(inside)
			world := p.ext.Agent(nil)
			for i, w := range p.paths() {
				for _, e := range []ending{serverFirst, clientResets} {
					t.Run(w.name+"/"+string(e), func(t *testing.T) {
						before := synsRepeated(t, w.clientNS)
						wantThrough(t, p.client(w, world), w.again(uint16(61001+i), e))
						repeated := synsRepeated(t, w.clientNS) - before
						switch {
						case e == clientResets: // leaves nothing behind
						case f == challenge && repeated < 19:
							t.Errorf("%d SYNs were repeated, want one for each of 19 challenges", repeated)
						case f == fast && repeated > 9:
							t.Errorf("%d SYNs were repeated; want none, of 19 that met a TIME_WAIT", repeated)
						}
					})
				}
			}
			if n := p.counters(t); n["lo_challenged"] < 3*19 || n["in_challenged"] < 3*19 {
				t.Errorf("counters %v, want at least %d lo_challenged and in_challenged", n, 3*19)
			}
		})
		t.Run("without the cure/"+string(f), func(t *testing.T) {
			t.Parallel()
			p := newPod(t)
			p.initForm(f, "time-wait")
			p.startProxy(inside)
			world := p.ext.Agent(nil)
			var hang []connecting
			for i, w := range p.paths() {
				a := w.again(uint16(61001+i), serverFirst)
				if w.direction == "outbound" {
					hang = append(hang, w.connecting(p.app, a))
				} else {
					goesPast(t, w, world, a)
				}
			}
			if ended := hangOrEnd(t, hang...); len(ended) == len(hang) && !t.Failed() {
				t.Skip("this kernel does not have the hang of a SYN that meets a TIME_WAIT (outbound): a listener takes it at once")
			} else if len(ended) > 0 {
				t.Errorf("some of the connects do not hang: %v", ended)
			}
		})
	}
}

// again asks for 20 connections from the port.
func (w path) again(port uint16, e ending) connectsArgs {
	return connectsArgs{
		To: w.start(sayPeer(e)), Mapped: w.name == "out/mapped", From: netip.AddrPortFrom(w.from, port), Count: 20, Ports: w.ports, Ending: e,
	}
}

// wantThrough makes connections, all of which must go through the proxy.
func wantThrough(t *testing.T, by *testnet.Agent, a connectsArgs) {
	t.Helper()
	r, err := connectsOp.Call(by, a)
	if err != nil {
		t.Fatal(err)
	}
	r.want(t, a.Count, nil)
}

// goesPast makes connections, of which some must go past the proxy, straight to the app.
func goesPast(t *testing.T, w path, world *testnet.Agent, a connectsArgs) {
	t.Helper()
	r, err := connectsOp.Call(world, a)
	if err != nil || r.Past == 0 {
		t.Errorf("%s: %+v, %v; want connections that went past the sidecar", w.name, r, err)
	}
	t.Logf("%s: %+v", w.name, r)
}

// TestTwoHundredPorts: a thousand connections to one server out of 200 source ports, so that each port comes back five
// times, closed by either side. Row 1.
func TestTwoHundredPorts(t *testing.T) {
	t.Parallel()
	for _, f := range []form{challenge, fast} {
		t.Run(string(f), func(t *testing.T) {
			t.Parallel()
			p := newPod(t)
			p.twoHundredPorts()
			p.initForm(f, "")
			p.startProxy(inside)
			world := p.ext.Agent(nil)
			for _, w := range p.paths() {
				for _, e := range []ending{serverFirst, clientFirst} {
					t.Run(w.name+"/"+string(e), func(t *testing.T) {
						if e == clientFirst && p.ns.SysctlValue("net.ipv4.tcp_tw_reuse_delay") == "absent" {
							t.Skip("this kernel lets a client have a port in TIME_WAIT only after a second: tcp_tw_reuse_delay is missing")
						}
						wantThrough(t, p.client(w, world), connectsArgs{
							To: w.start(sayPeer(e)), Mapped: w.name == "out/mapped", Count: 1000, Workers: 16, Ports: w.ports, Ending: e,
						})
					})
				}
			}
		})
	}
	t.Run("without the cure", func(t *testing.T) {
		t.Parallel()
		p := newPod(t)
		p.twoHundredPorts()
		p.initForm(challenge, "time-wait")
		p.startProxy(inside)
		world := p.ext.Agent(nil)
		var hang []connecting
		for _, w := range p.paths() {
			a := connectsArgs{To: w.start(sayPeer(serverFirst)), Mapped: w.name == "out/mapped", Count: 500, Workers: 16, Ports: w.ports, Ending: serverFirst}
			if w.direction == "outbound" {
				hang = append(hang, w.connecting(p.app, a))
			} else {
				goesPast(t, w, world, a)
			}
		}
		wantHang(t, hang...)
	})
}

// twoHundredPorts leaves 200 ephemeral ports to the pod and to the world, which their owners may have again at once.
func (p *pod) twoHundredPorts() {
	for _, ns := range []*testnet.Namespace{p.ns, p.ext} {
		ns.Sysctl("net.ipv4.ip_local_port_range", "40000 40199")
		ns.Sysctl("net.ipv4.tcp_tw_reuse", "1")
		if ns.SysctlValue("net.ipv4.tcp_tw_reuse_delay") != "absent" {
			ns.Sysctl("net.ipv4.tcp_tw_reuse_delay", "1")
		}
	}
}

// TestTimeWaitThatIgnoresResets: with tcp_rfc1337 neither form of the cure can work, so init turns it off, and clean on
// again. Row 1.
func TestTimeWaitThatIgnoresResets(t *testing.T) {
	t.Parallel()
	const sysctl = "net.ipv4.tcp_rfc1337"
	for _, f := range []form{challenge, fast} {
		t.Run(string(f), func(t *testing.T) {
			t.Parallel()
			p := newPod(t)
			p.ns.Sysctl(sysctl, "1")
			p.initForm(f, "")
			p.startProxy(inside)
			world := p.ext.Agent(nil)
			for i, w := range p.paths() {
				wantThrough(t, p.client(w, world), w.again(uint16(61001+i), serverFirst))
			}
			t.Run("without the cure", func(t *testing.T) {
				p.ns.Sysctl(sysctl, "1")
				if r := run(t, p.pillion("status", "--cgroup", p.cg.Path)); r.code == 0 || !strings.Contains(r.stdout, sysctl) {
					t.Errorf("status ends with %d, want another than 0, and the sysctl named\n%s", r.code, r.stdout)
				}
				var hang []connecting
				for i, w := range p.paths() {
					hang = append(hang, w.connecting(p.client(w, world), w.again(uint16(41001+i), serverFirst)))
				}
				wantHang(t, hang...)
				p.wantFewChallenges(t)
			})
			p.ns.Sysctl(sysctl, "0")
			must(t, "clean", p.clean())
			if v := p.ns.SysctlValue(sysctl); v != "1" {
				t.Errorf("%s is %s after clean, want 1 as before init", sysctl, v)
			}
		})
	}
}

// TestOlderTimestamp: a client whose timestamps go back between two connections (RFC 7323 section 5.3) sends resets that
// TIME_WAIT does not heed when they carry one. Row 1.
func TestOlderTimestamp(t *testing.T) {
	t.Parallel()
	for _, f := range []form{challenge, fast} {
		t.Run(string(f), func(t *testing.T) {
			t.Parallel()
			p := newPod(t)
			p.initForm(f, "")
			p.startProxy(inside)
			world := p.ext.Agent(nil)
			for i, w := range p.paths() {
				a := w.again(uint16(61001+i), serverFirst)
				a.Count = 1
				for round := range 6 { // of two that follow each other, one goes back: with a random offset, and without
					w.clientNS.Sysctl("net.ipv4.tcp_timestamps", strconv.Itoa(1+round%2))
					wantThrough(t, p.client(w, world), a)
				}
			}
			p.wantFewChallenges(t)
		})
	}
}

// wantFewChallenges fails the test if the programs kept themselves busy: each SYN that meets a TIME_WAIT is counted once
// or twice.
func (p *pod) wantFewChallenges(t *testing.T) {
	t.Helper()
	if n := p.counters(t); n["lo_challenged"] > 1000 || n["in_challenged"] > 1000 {
		t.Errorf("%d challenges on lo and %d from outside; there were a few SYNs", n["lo_challenged"], n["in_challenged"])
	}
}

// synsRepeated is how many SYNs the namespace has sent more than once.
func synsRepeated(t *testing.T, ns *testnet.Namespace) int {
	t.Helper()
	var b []byte
	var err error
	ns.Do(func() { b, err = os.ReadFile("/proc/thread-self/net/netstat") })
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(b), "\n")
	for i := 0; i+1 < len(lines); i += 2 { // a line of names, a line of values
		names, values := strings.Fields(lines[i]), strings.Fields(lines[i+1])
		for j, name := range names {
			if name == "TCPSynRetrans" {
				n, err := strconv.Atoi(values[j])
				if err != nil {
					t.Fatal(err)
				}
				return n
			}
		}
	}
	t.Fatal("no TCPSynRetrans in /proc/net/netstat")
	return 0
}
