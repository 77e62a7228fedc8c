// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/test/testnet"
)

// TestAddressesAreTrueAtAllFourEnds is the one idea of the design, seen from outside.
func TestAddressesAreTrueAtAllFourEnds(t *testing.T) {
	for _, where := range placements {
		t.Run(string(where), func(t *testing.T) {
			t.Parallel()
			p := newCaptured(t, where)
			for _, w := range p.paths() {
				t.Run(w.name, func(t *testing.T) { p.captured(t, w) })
			}
		})
	}
}

// TestWaysToConnect: whatever an app does to its socket before or while it connects, the connection is captured and its
// addresses are true.
func TestWaysToConnect(t *testing.T) {
	t.Parallel()
	p := newCaptured(t, inside)
	for i, w := range p.paths()[:3] {
		own, second := pod4, second4
		if w.from.Is6() {
			own, second = pod6, second6
		}
		for _, tt := range []struct {
			name string
			from string // the address that everybody must see
			dial testnet.Dial
		}{
			{"blocking", own, testnet.Dial{}},
			{"non-blocking", own, testnet.Dial{NonBlock: true}},
			{"bound to an address", own, testnet.Dial{From: net.JoinHostPort(own, "0")}},
			{"bound to another address", second, testnet.Dial{From: net.JoinHostPort(second, "0")}},
			{"bound to a port", own, testnet.Dial{From: net.JoinHostPort(own, fmt.Sprint(7777+i)), Reuse: true}},
			{"bound to a device", own, testnet.Dial{Device: "eth0"}},
			{"fast open", own, testnet.Dial{FastOpen: []byte("t")}},
			{"MPTCP", own, testnet.Dial{MPTCP: true}},
			{"with a mark", own, testnet.Dial{Mark: 5}},
		} {
			t.Run(strings.TrimPrefix(w.name, "out/")+"/"+tt.name, func(t *testing.T) {
				if tt.dial.MPTCP {
					testnet.Need(t, testnet.MPTCP)
				}
				w := w
				w.from = netip.MustParseAddr(tt.from)
				saw := make(chan seen, 1)
				to := w.start(echo(saw))
				d := tt.dial
				d.To, d.Mapped, d.Timeout = to.String(), w.name == "out/mapped", time.Minute
				c, err := p.app.Dial(d)
				if err != nil {
					t.Fatal(err)
				}
				if len(d.FastOpen) > 0 { // its first byte is under way: take the echo of it, then go on as the others
					defer c.Close()
					if err := errors.Join(readExactly(c, "t"), finish(c.TCPConn)); err != nil {
						t.Fatal(err)
					}
					r := p.proxy.waitRecordOf(t, c)
					if r.Destination != to || r.Sent != 1 || r.Received != 1 || r.Reason != "ok" {
						t.Errorf("record %+v, want destination %s, a byte each way, reason ok", r, to)
					}
					return
				}
				p.wentThrough(t, w, c, to, saw)
			})
		}
	}
}

func readExactly(c io.Reader, want string) error {
	b := make([]byte, len(want))
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	if string(b) != want {
		return fmt.Errorf("read %q, want %q", b, want)
	}
	return nil
}

// TestProcessesOfTheCgroup: every process in it is captured, whoever it is and whatever made it.
func TestProcessesOfTheCgroup(t *testing.T) {
	t.Parallel()
	p := newCaptured(t, inside)
	nobody := p.ns.AgentAs(p.appCG, &testnet.User{UID: 65534, GID: 65534})
	deep := p.ns.Agent(p.appCG.Child("deep").Child("deeper"))
	setuid := p.ns.Agent(p.appCG)
	if _, err := becomeOp.Call(setuid, 65534); err != nil {
		t.Fatal(err)
	}
	moved := p.ns.Agent(nil)
	p.appCG.Add(moved.Pid())
	for _, w := range p.paths()[:2] {
		for _, tt := range []struct {
			name string
			by   *testnet.Agent
		}{{"another user", nobody}, {"after setuid", setuid}, {"a cgroup below", deep}, {"moved in", moved}} {
			t.Run(w.name+"/"+tt.name, func(t *testing.T) {
				w := w
				w.dial = func(to netip.AddrPort) (*testnet.Conn, error) { return tt.by.Dial(testnet.Dial{To: to.String()}) }
				p.captured(t, w)
			})
		}
		t.Run(w.name+"/forked", func(t *testing.T) {
			saw := make(chan seen, 1)
			to := w.start(echo(saw))
			own, err := forkOp.Call(p.app, to.String())
			if err != nil {
				t.Fatal(err)
			}
			if r, server := p.proxy.waitRecord(t, own), <-saw; r.Destination != to || r.Upstream != server.peer || r.Reason != "ok" {
				t.Errorf("record %+v, want destination %s, upstream %s", r, to, server.peer)
			}
		})
	}
}

// TestOnlyTheCgroupIsCaptured: others in the same namespace, own addresses, loopback and UDP are none of our business.
func TestOnlyTheCgroupIsCaptured(t *testing.T) {
	t.Parallel()
	p := newCaptured(t, inside)
	neighbour := p.ns.Agent(p.net.Cgroup("neighbour"))
	by := func(a *testnet.Agent, w path) path {
		w.dial = func(to netip.AddrPort) (*testnet.Conn, error) { return a.Dial(testnet.Dial{To: to.String()}) }
		return w
	}
	for _, w := range p.paths()[:2] {
		t.Run(w.name+"/a process outside", func(t *testing.T) {
			p.direct(t, by(neighbour, w))
			p.captured(t, w) // the same path, by the app
		})
	}
	for i, w := range p.paths()[3:5] {
		loopback := []string{"127.0.0.1", "::1"}[i]
		for _, host := range []string{w.to.String(), loopback} {
			t.Run("from the app to its own "+host, func(t *testing.T) {
				w := by(p.app, w)
				w.to = netip.MustParseAddr(host)
				p.direct(t, w)
			})
		}
	}
	for _, host := range []string{server4, server6, pod4, "127.0.0.1"} {
		t.Run("UDP to "+host, func(t *testing.T) { p.udp(t, host) })
	}
}

// udp sends a datagram from the app, to a server that answers with whom it sees.
func (p *pod) udp(t *testing.T, host string) {
	ns := p.ext
	if host == pod4 || host == "127.0.0.1" {
		ns = p.ns
	}
	var pc net.PacketConn
	var err error
	ns.Do(func() { pc, err = net.ListenPacket("udp", net.JoinHostPort(host, "0")) })
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() {
		b := make([]byte, 100)
		_, from, err := pc.ReadFrom(b)
		if err == nil {
			_, err = pc.WriteTo([]byte(from.String()), from)
		}
		served <- err
	}()
	answer, err := udpOp.Call(p.app, pc.LocalAddr().String())
	pc.Close()
	if err := errors.Join(err, <-served); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{server4: pod4, server6: pod6, pod4: pod4, "127.0.0.1": "127.0.0.1"}[host]
	if got, err := netip.ParseAddrPort(answer); err != nil || got.Addr().String() != want {
		t.Errorf("the server saw %q (%v), want %s", answer, err, want)
	}
}

// TestTwoThousandAtOnce: as many connections as a busy app has, all open at the same time.
func TestTwoThousandAtOnce(t *testing.T) {
	t.Parallel()
	const count = 2000
	p := newCaptured(t, inside)
	client := p.ext.Agent(nil)
	for _, w := range p.paths() {
		if w.name == "out/mapped" || w.name == "in/mapped" {
			continue
		}
		t.Run(w.name, func(t *testing.T) {
			saw := make(chan seen, count)
			to := w.start(echo(saw))
			by := p.app
			if w.direction == "inbound" {
				by = client
			}
			r, err := stormOp.Call(by, stormArgs{To: to.String(), Count: count})
			if err != nil {
				t.Fatal(err)
			}
			if r.OK != count {
				t.Errorf("%d of %d connections were right; the others: %v", r.OK, count, r.Errors)
			}
			ok := 0
			testnet.Wait(t, "every connection is recorded", func() bool {
				ok = 0
				for _, r := range p.proxy.records() {
					if r.Destination == to && r.Reason == "ok" {
						ok++
					}
				}
				return ok >= count
			})
			if ok != count {
				t.Errorf("%d records of %d connections", ok, count)
			}
		})
	}
}

// TestOwnListenersAreNoDestination: nobody reaches the proxy through itself, and it survives the attempt.
func TestOwnListenersAreNoDestination(t *testing.T) {
	t.Parallel()
	for _, where := range placements {
		t.Run(string(where), func(t *testing.T) {
			p := newCaptured(t, where)
			remote := p.ext.Agent(nil)
			for _, port := range []uint16{config.PortOutbound, config.PortInbound, config.PortInboundOwn} {
				for _, try := range []struct {
					who  string
					from *testnet.Agent
					to   string
				}{
					{"the app by loopback", p.app, "127.0.0.1"},
					{"the app by loopback", p.app, "::1"},
					{"the app by its own address", p.app, pod4},
					{"the app by its own address", p.app, pod6},
					{"the world", remote, pod4},
					{"the world", remote, pod6},
				} {
					to := net.JoinHostPort(try.to, fmt.Sprint(port))
					c, err := try.from.Dial(testnet.Dial{To: to})
					if err == nil {
						_, err = c.Read(make([]byte, 1))
						c.Close()
					}
					if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.ECONNRESET) {
						t.Errorf("%s to %s: %v, want it refused or reset", try.who, to, err)
					}
				}
			}
			for _, w := range p.paths() {
				p.captured(t, w)
			}
		})
	}
}
