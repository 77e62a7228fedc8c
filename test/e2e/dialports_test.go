// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net/netip"
	"testing"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/test/testnet"
)

// appPorts are all that a client may have in these tests: two hundred.
var appPorts = config.PortRange{First: 40000, Last: 40199}

func narrow(ns *testnet.Namespace) {
	ns.Sysctl("net.ipv4.ip_local_port_range", fmt.Sprintf("%d %d", appPorts.First, appPorts.Last)) // both families
}

const (
	noPort  = "cannot assign requested address"
	reset   = "connection reset by peer"
	refused = "connection refused"
)

// TestAppHasAllItsPorts: the proxy's dials do not use up ports that the app could have had: of 300 connections to one
// destination from 200 ports, which the app closes first, 200 are made, as without a sidecar. Row 7.
func TestAppHasAllItsPorts(t *testing.T) {
	t.Parallel()
	through := func(t *testing.T, dials config.PortRange) map[string]connectsResult {
		p := newPod(t)
		narrow(p.ns)
		p.init("--dial-outbound", dials.String())
		p.startProxy(inside, "--dial-outbound", dials.String())
		got := map[string]connectsResult{}
		for _, w := range p.paths()[:2] {
			r, err := connectsOp.Call(p.app, connectsArgs{To: w.start(sayPeer(clientFirst)), Count: 300, Workers: 4, Ports: dials, Ending: clientFirst})
			if err != nil {
				t.Fatal(err)
			}
			got[w.name] = r
		}
		return got
	}
	for name, r := range through(t, config.DialOutbound) {
		t.Run(name, func(t *testing.T) { r.want(t, appPorts.Len(), map[string]int{noPort: 300 - appPorts.Len()}) })
	}
	t.Run("without the cure", func(t *testing.T) { // the proxy dials from the app's ports
		for name, r := range through(t, appPorts) {
			if r.Through >= appPorts.Len() {
				t.Errorf("%s: %+v; want fewer than %d made", name, r, appPorts.Len())
			}
		}
	})
}

// TestManyConnectionsOfOneClient: 60 live inbound connections of one client address that has 200 ports. Row 7.
func TestManyConnectionsOfOneClient(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	narrow(p.ns)
	narrow(p.ext)
	p.init()
	p.startProxy(inside)
	world := p.ext.Agent(nil)
	for _, w := range p.paths()[3:] {
		t.Run(w.name, func(t *testing.T) {
			wantThrough(t, world, connectsArgs{To: w.start(sayPeer(staysOpen)), Count: 60, Workers: 8, Ports: w.ports, Ending: staysOpen})
		})
	}
}

// TestPortsExhausted: when every port of the proxy's own is in use towards a destination, the connection is reset at once
// and the reason is in the log. A port that somebody listens on is stepped over. Row 7.
func TestPortsExhausted(t *testing.T) {
	t.Parallel()
	few := config.PortRange{First: 20000, Last: 20019}
	p := newPod(t)
	p.init("--dial-outbound", few.String())
	taken := p.ns.Listen("tcp4", pod4+":20007")
	defer taken.Close()
	p.startProxy(inside, "--dial-outbound", few.String())
	w := p.paths()[0]
	r, err := connectsOp.Call(p.app, connectsArgs{To: w.start(sayPeer(staysOpen)), Count: 30, Ports: few, Ending: staysOpen})
	if err != nil {
		t.Fatal(err)
	}
	r.want(t, few.Len()-1, map[string]int{reset: 30 - (few.Len() - 1)})
	testnet.Wait(t, "the log has the reason", func() bool {
		n := 0
		for _, r := range p.proxy.records() {
			if r.Reason == "ports_exhausted" {
				n++
			}
		}
		return n == 30-(few.Len()-1)
	})
}

// TestClientUsesThePortOfADialInItsName: the client's SYN meets the app's socket of another connection, which the proxy
// dialled in the client's name from that very port. Nobody can serve it: it is refused at once, and counted. Row 8.
func TestClientUsesThePortOfADialInItsName(t *testing.T) {
	t.Parallel()
	collide := func(t *testing.T, without string) (*pod, *testnet.Agent, []path, []connectsArgs) {
		p := newPod(t)
		p.initForm(challenge, without)
		p.startProxy(inside)
		ways := p.paths()[3:5]
		var all []connectsArgs
		for _, w := range ways {
			to := w.start(sayPeer(staysOpen))
			c, err := w.dial(to)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			if _, err := io.WriteString(c, "x"); err != nil {
				t.Fatal(err)
			}
			line, err := bufio.NewReader(c).ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, connectsArgs{To: to, From: netip.MustParseAddrPort(line[:len(line)-1]), Count: 1, Ports: w.ports})
		}
		return p, p.ext.Agent(nil), ways, all
	}
	p, world, ways, all := collide(t, "")
	for i, a := range all {
		r, err := connectsOp.Call(world, a)
		if err != nil {
			t.Fatalf("%s: %v", ways[i].name, err)
		}
		r.want(t, 0, map[string]int{refused: 1})
	}
	if n := p.counters(t)["in_collision"]; n != uint64(len(all)) {
		t.Errorf("%d collisions counted, want %d", n, len(all))
	}
	t.Run("without the cure", func(t *testing.T) {
		_, world, ways, all := collide(t, "collision")
		var hang []connecting
		for i, a := range all {
			hang = append(hang, ways[i].connecting(world, a))
		}
		wantHang(t, hang...)
	})
}
