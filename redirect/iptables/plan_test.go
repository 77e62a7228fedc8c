// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"bytes"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"gotest.tools/v3/golden"
)

// A host as most are.
var (
	dual = redirect.Host{Interfaces: []redirect.Interface{
		{Index: 1, Name: "lo", Loopback: true, Up: true, IPv6: true},
		{Index: 2, Name: "eth0", Up: true, Ethernet: true, IPv6: true},
	}, IPv6: true}
	ipv4Only = redirect.Host{Interfaces: []redirect.Interface{
		{Index: 1, Name: "lo", Loopback: true, Up: true}, {Index: 2, Name: "eth0", Up: true, Ethernet: true},
	}}
)

func toolsOn(flavour Flavour, tracked bool) Tools {
	t := Tools{Of: make(map[redirect.Family]Tool), Missing: make(map[redirect.Family]error), Tracked: tracked}
	for _, f := range []redirect.Family{redirect.IPv4, redirect.IPv6} {
		name := base(f) + "-" + string(flavour)
		t.Of[f] = Tool{Family: f, Name: name, Path: "/usr/sbin/" + name, Flavour: flavour}
	}
	return t
}

// selective is a policy that filters by everything that there is.
func selective() config.Capture {
	c := config.DefaultCapture()
	s := &c.Selection
	s.OutboundPorts.Exclude = []config.PortRange{{First: 1, Last: 1}, {First: 100, Last: 200}}
	s.OutboundCIDRs.Include = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")}
	s.OutboundCIDRs.Exclude = []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}
	s.OutboundInterfaces.Exclude = []config.InterfaceName{"tun*"}
	s.UIDs.Include = []config.IDRange{{First: 1000, Last: 1999}}
	s.GIDs.Exclude = []config.IDRange{{First: 0, Last: 0}}
	s.InboundCIDRs.Exclude = []netip.Prefix{netip.MustParsePrefix("fe80::/10")}
	s.InboundInterfaces.Include = []config.InterfaceName{"eth0"}
	// More than a rule of multiport takes.
	for p := uint16(9000); p < 9040; p += 2 {
		s.InboundPorts.Include = append(s.InboundPorts.Include, config.PortRange{First: p, Last: p})
	}
	return c
}

func TestPlanIsWhatTheGoldenFilesSay(t *testing.T) {
	closed := config.DefaultCapture()
	closed.OnProxyDown, closed.OnProxyDownInbound = config.Closed, config.Closed
	third := config.DefaultCapture()
	third.Slot = 3
	for _, tt := range []struct {
		name    string
		backend string
		policy  config.Capture
		host    redirect.Host
		tools   Tools
	}{
		{"tproxy", TProxy, config.DefaultCapture(), dual, toolsOn(NFT, true)},
		{"tproxy-untracked", TProxy, config.DefaultCapture(), ipv4Only, toolsOn(Legacy, false)},
		{"tproxy-selective", TProxy, selective(), dual, toolsOn(NFT, true)},
		{"tproxy-slot", TProxy, third, ipv4Only, toolsOn(NFT, true)},
		{"redirect", Redirect, config.DefaultCapture(), dual, toolsOn(Legacy, true)},
		{"redirect-closed", Redirect, closed, ipv4Only, toolsOn(NFT, true)},
		{"redirect-selective", Redirect, selective(), ipv4Only, toolsOn(NFT, true)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			plan, err := Plan(tt.backend, tt.policy, tt.host, tt.tools)
			if err != nil {
				t.Fatal(err)
			}
			var got bytes.Buffer
			if err := plan.WriteText(&got); err != nil {
				t.Fatal(err)
			}
			golden.Assert(t, got.String(), tt.name+".plan")
			wantSound(t, plan)
		})
	}
}

// wantSound checks what must hold of the rules of every plan.
func wantSound(t *testing.T, plan redirect.Plan) {
	t.Helper()
	for _, table := range plan.Tables {
		for _, r := range append(table.Rules, table.Jumps...) {
			if strings.Count(r.Match, "-m tcp ") > 1 {
				t.Errorf("%s: two matches of tcp, which iptables-nft 1.8.9 lists as one", line(r))
			}
			for _, m := range []string{"-m tcp ", "-m multiport "} {
				if at := strings.Index(r.Match, m); at >= 0 && !strings.Contains(r.Match[:at], "-p tcp") {
					t.Errorf("%s: %sneeds -p tcp before it", line(r), m)
				}
			}
			if len(r.Why) > 255 || r.Why == "" {
				t.Errorf("%s: a reason of %d bytes", line(r), len(r.Why))
			}
		}
	}
}

func TestWhatAPlanRefuses(t *testing.T) {
	with := func(change func(*config.Capture)) config.Capture {
		c := config.DefaultCapture()
		change(&c)
		return c
	}
	byUID := with(func(c *config.Capture) { c.Selection.UIDs.Exclude = []config.IDRange{{First: 1, Last: 1}} })
	none := toolsOn(NFT, true)
	delete(none.Of, redirect.IPv6)
	none.Missing[redirect.IPv6] = errors.New("not there")
	for _, tt := range []struct {
		name    string
		backend string
		policy  config.Capture
		tools   Tools
		exit    int
		says    string
	}{
		{"a cgroup", TProxy, with(func(c *config.Capture) { c.Cgroup = "/sys/fs/cgroup/pod" }), toolsOn(NFT, true), config.ExitConfig, "--cgroup /sys/fs/cgroup/pod"},
		{"open", Redirect, with(func(c *config.Capture) { c.OnProxyDown = config.Open }), toolsOn(NFT, true), config.ExitConfig, "--on-proxy-down open"},
		{"closed", TProxy, with(func(c *config.Capture) { c.OnProxyDownInbound = config.Closed }), toolsOn(NFT, true), config.ExitConfig, "--on-proxy-down-inbound closed"},
		{"users, untracked", TProxy, byUID, toolsOn(NFT, false), config.ExitConfig, "nf_conntrack is not loaded"},
		{"no ip6tables", TProxy, config.DefaultCapture(), none, config.ExitUnavailable, "IPv6 would pass uncaptured: not there"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Plan(tt.backend, tt.policy, dual, tt.tools)
			if err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Fatalf("%v, want it to say %q", err, tt.says)
			}
			if got := config.ExitOf(err); got != tt.exit {
				t.Errorf("exit status %d, want %d", got, tt.exit)
			}
			if config.HintOf(err) == "" {
				t.Error("no hint")
			}
		})
	}
	if _, err := Plan(TProxy, byUID, dual, toolsOn(NFT, true)); err != nil {
		t.Errorf("users, tracked: %v", err)
	}
	if _, err := Plan(TProxy, config.DefaultCapture(), ipv4Only, none); err != nil {
		t.Errorf("no ip6tables and no IPv6: %v", err)
	}
}
