// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/test/testnet"
)

// TestSelection: what the flags select is captured, and their neighbours at every edge are not; and what they exclude goes
// direct, and its neighbours are captured.
func TestSelection(t *testing.T) {
	for _, tt := range selections() {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t)
			p.init(tt.flags(p)...)
			p.startProxy(inside)
			for _, c := range tt.cases(p) {
				for _, w := range c.paths {
					t.Run(fmt.Sprintf("%s/%s", w.name, c.name), func(t *testing.T) { p.goes(t, w, c.captured) })
				}
			}
		})
	}
}

// selection is a set of flags, and connections that they capture or leave alone.
type selection struct {
	name  string
	flags func(*pod) []string
	cases func(*pod) []selectionCase
}

type selectionCase struct {
	name     string
	paths    []path
	captured bool
}

func selections() []selection {
	flags := func(f ...string) func(*pod) []string { return func(*pod) []string { return f } }
	return []selection{
		{"exclude outbound ports", flags("--exclude-outbound-ports=8000-8999,65535"), func(p *pod) []selectionCase {
			return atPorts(p.outbound(), map[uint16]bool{7999: true, 8000: false, 8999: false, 9000: true, 65534: true, 65535: false})
		}},
		{"include outbound ports", flags("--include-outbound-ports=8000-8002", "--exclude-outbound-ports=8001"), func(p *pod) []selectionCase {
			return atPorts(p.outbound(), map[uint16]bool{7999: false, 8000: true, 8001: false, 8002: true, 8003: false})
		}},
		{"all ports but one", flags("--exclude-outbound-ports=0-7999,8001-65535"), func(p *pod) []selectionCase {
			return atPorts(p.outbound(), map[uint16]bool{7999: false, 8000: true, 8001: false, 65535: false, 1: false})
		}},
		{"exclude one outbound address", flags("--exclude-outbound-cidrs=10.99.0.1,fd99::1"), func(p *pod) []selectionCase {
			return []selectionCase{{"the one", p.outbound(), false}, {"another", p.outboundTo(client4, client6), true}}
		}},
		{"exclude outbound prefixes", flags("--exclude-outbound-cidrs", "10.99.0.0/31,fd99::/127"), func(p *pod) []selectionCase {
			return []selectionCase{{"within", p.outbound(), false}, {"outside", p.outboundTo(client4, client6), true}}
		}},
		{"include outbound prefixes", flags("--include-outbound-cidrs=10.99.0.0/16,fd99::/16", "--exclude-outbound-cidrs=10.99.0.2/31,fd99::2/127"), func(p *pod) []selectionCase {
			return []selectionCase{{"within", p.outbound(), true}, {"outside", p.outboundTo(client4, client6), false}}
		}},
		{"exclude all of IPv4", flags("--exclude-outbound-cidrs=0.0.0.0/0"), func(p *pod) []selectionCase {
			w := p.outbound()
			return []selectionCase{{"", []path{w[0], w[2]}, false}, {"", []path{w[1]}, true}}
		}},
		{"exclude all of IPv6", flags("--exclude-outbound-cidrs=::/0"), func(p *pod) []selectionCase {
			w := p.outbound()
			return []selectionCase{{"", []path{w[0], w[2]}, true}, {"", []path{w[1]}, false}}
		}},
		{"five hundred entries", flags(
			"--exclude-outbound-ports="+many(500, func(i int) string { return fmt.Sprint(10000 + 2*i) }),
			"--exclude-outbound-cidrs="+many(500, func(i int) string { return fmt.Sprintf("10.%d.%d.0/25", 100+i/250, i%250) }),
			"--include-inbound-ports="+many(500, func(i int) string { return fmt.Sprint(10000 + 2*i) }),
		), func(p *pod) []selectionCase {
			return append(atPorts(p.outbound(), map[uint16]bool{9998: true, 10000: false, 10001: true, 10998: false, 10999: true, 11000: true}),
				atPorts(p.inbound(), map[uint16]bool{9998: false, 10000: true, 10001: false, 10998: true, 10999: false})...)
		}},
		{"exclude users", flags("--exclude-uids=1000-1999"), func(p *pod) []selectionCase {
			return []selectionCase{
				{"0", p.outbound(), true},
				{"1000", p.outboundAs(1000, 0), false},
				{"1999", p.outboundAs(1999, 0), false},
				{"2000", p.outboundAs(2000, 0), true},
				{"inbound", p.inbound(), true},
			}
		}},
		{"include users and groups", flags("--include-uids=1000,2000", "--exclude-gids=500", "--include-gids=0,500,501"), func(p *pod) []selectionCase {
			return []selectionCase{
				{"0", p.outbound(), false},
				{"1000:0", p.outboundAs(1000, 0), true},
				{"1000:500", p.outboundAs(1000, 500), false},
				{"2000:501", p.outboundAs(2000, 501), true},
				{"2000:502", p.outboundAs(2000, 502), false},
			}
		}},
		{"exclude inbound ports", flags("--exclude-inbound-ports=8000-8999"), func(p *pod) []selectionCase {
			return append(atPorts(p.inbound(), map[uint16]bool{7999: true, 8000: false, 8999: false, 9000: true}),
				selectionCase{"outbound", p.outbound(), true})
		}},
		{"include inbound ports", flags("--include-inbound-ports=8000", "--include-outbound-ports=8000"), func(p *pod) []selectionCase {
			return append(atPorts(p.inbound(), map[uint16]bool{7999: false, 8000: true, 8001: false}),
				atPorts(p.outbound(), map[uint16]bool{7999: false, 8000: true, 8001: false})...)
		}},
		{"exclude inbound addresses", flags("--exclude-inbound-cidrs=10.99.0.0/16,fd99::1"), func(p *pod) []selectionCase {
			return []selectionCase{{"another", p.inbound(), true}, {"the one", p.inboundFrom(server4, server6), false}}
		}},
		{"include inbound addresses", flags("--include-inbound-cidrs=10.99.0.1,fd99::1"), func(p *pod) []selectionCase {
			return []selectionCase{{"another", p.inbound(), false}, {"the one", p.inboundFrom(server4, server6), true}}
		}},
		{"exclude an inbound interface", flags("--exclude-inbound-interfaces=eth0"), func(p *pod) []selectionCase {
			return []selectionCase{{"inbound", p.inbound(), false}, {"outbound", p.outbound(), true}}
		}},
		{"include other inbound interfaces", flags("--include-inbound-interfaces=net*,eth1"), func(p *pod) []selectionCase {
			return []selectionCase{{"inbound", p.inbound(), false}, {"outbound", p.outbound(), true}}
		}},
		{"include the inbound interfaces", flags("--include-inbound-interfaces=e*"), func(p *pod) []selectionCase {
			return []selectionCase{{"inbound", p.inbound(), true}}
		}},
		{"exclude a cgroup", func(p *pod) []string {
			return []string{"--exclude-cgroups=" + p.initCG.Path}
		}, func(p *pod) []selectionCase {
			alone := p.ns.Agent(p.initCG.Child("deeper"))
			return []selectionCase{
				{"the app", append(p.outbound(), p.inbound()...), true},
				{"the excluded", append(by(alone, p.outbound()), by(alone, p.inbound())...), false},
			}
		}},
	}
}

func many(n int, one func(int) string) string {
	list := make([]string, n)
	for i := range list {
		list[i] = one(i)
	}
	return strings.Join(list, ",")
}

func (p *pod) outbound() []path { return p.paths()[:3] }
func (p *pod) inbound() []path  { return p.paths()[3:] }

// atPorts are the paths with a server at each of the ports.
func atPorts(paths []path, captured map[uint16]bool) (cases []selectionCase) {
	for port, yes := range captured {
		c := selectionCase{name: fmt.Sprint(port), captured: yes}
		for _, w := range paths {
			w.port = port
			c.paths = append(c.paths, w)
		}
		cases = append(cases, c)
	}
	return cases
}

// outboundTo are the outbound paths to other addresses of the world.
func (p *pod) outboundTo(v4, v6 string) []path {
	paths := p.outbound()
	for i := range paths {
		paths[i].to = netip.MustParseAddr(v4)
		if paths[i].from.Is6() {
			paths[i].to = netip.MustParseAddr(v6)
		}
	}
	return paths
}

// inboundFrom are the inbound paths from other addresses of the world.
func (p *pod) inboundFrom(v4, v6 string) []path {
	paths := p.inbound()
	for i, w := range paths {
		from := v4
		if w.from.Is6() {
			from = v6
		}
		paths[i].from = netip.MustParseAddr(from)
		paths[i].dial = func(to netip.AddrPort) (*testnet.Conn, error) {
			return p.ext.Agent(nil).Dial(testnet.Dial{To: to.String(), From: netip.AddrPortFrom(netip.MustParseAddr(from), 0).String()})
		}
	}
	return paths
}

// outboundAs are the outbound paths of a process of another user.
func (p *pod) outboundAs(uid, gid uint32) []path {
	return by(p.ns.AgentAs(p.appCG, &testnet.User{UID: uid, GID: gid}), p.outbound())
}

// by has an agent at the app's end of the paths.
func by(agent *testnet.Agent, paths []path) []path {
	for i, w := range paths {
		if w.direction == "inbound" {
			paths[i].serve = agent.Serve
			continue
		}
		mapped := strings.HasSuffix(w.name, "mapped")
		paths[i].dial = func(to netip.AddrPort) (*testnet.Conn, error) {
			return agent.Dial(testnet.Dial{To: to.String(), Mapped: mapped})
		}
	}
	return paths
}

// goes connects once over the path and checks which way it went, by whom the server sees: the client's very socket, or a
// port of the proxy's.
func (p *pod) goes(t *testing.T, w path, captured bool) {
	t.Helper()
	saw := make(chan seen, 1)
	server, to := w.server(echo(saw))
	defer server.Close()
	c, err := w.dial(to)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := errors.Join(exchange(c, "which way?"), finish(c.TCPConn)); err != nil {
		t.Fatal(err)
	}
	peer := (<-saw).peer
	switch {
	case peer == unmap(c.Own) && captured:
		t.Errorf("passed uncaptured: the server saw the client's own socket %s", peer)
	case peer == unmap(c.Own):
	case !w.ports.Contains(peer.Port()):
		t.Errorf("the server saw %s, neither the client's %s nor a port of the proxy's", peer, c.Own)
	case !captured:
		t.Errorf("captured: the server saw %s, a port of the proxy's", peer)
	}
}

// TestSelectionThatIsRefused: what ebpf cannot honour is refused, before anything is changed; so is what cannot be meant.
func TestSelectionThatIsRefused(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	before := p.snapshot()
	for _, tt := range []struct {
		name string
		flag string
		code int
		says string
	}{
		{"by interface", "--exclude-outbound-interfaces=eth0", config.ExitConfig, "decides before"},
		{"a cgroup elsewhere", "--exclude-cgroups=" + p.net.Cgroup("else").Path, config.ExitConfig, "is not below"},
		{"no cgroup", "--exclude-cgroups=" + p.cg.Path + "/none", config.ExitConfig, "none"},
		{"a wrong port", "--exclude-outbound-ports=80,http", config.ExitUsage, "http"},
		{"a wrong prefix", "--include-outbound-cidrs=10.0.0.1/8", config.ExitUsage, "10.0.0.0/8"},
		{"a name for an id", "--exclude-uids=root", config.ExitUsage, "id -u"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			wantFault(t, run(t, p.initCmd(tt.flag)), tt.code, tt.says)
			same(t, "after the refusal", before, p.snapshot())
		})
	}
}
