// SPDX-License-Identifier: Apache-2.0

package config

import (
	"net/netip"
	"testing"
)

func TestWitnesses(t *testing.T) {
	ports, cidrs, ids := must[[]PortRange](t), must[[]netip.Prefix](t), must[[]IDRange](t)
	base := Flow{Address: netip.MustParseAddrPort("10.77.0.2:50000")}
	base6 := Flow{Address: netip.MustParseAddrPort("[fd77::2]:50000")}
	in := base
	in.Inbound = true
	for _, tt := range []struct {
		name      string
		selection Selection
		base      Flow
		want      []Witness
	}{
		{"all", Selection{}, base, []Witness{{base, Verdict{true, "nothing excludes it"}}}},
		{"a port out", Selection{OutboundPorts: Selector[PortRange]{Exclude: ports(ParsePorts("80"))}}, base, []Witness{
			{base, Verdict{true, "nothing excludes it"}},
			{Flow{Address: netip.MustParseAddrPort("10.77.0.2:80")}, Verdict{Rule: "--exclude-outbound-ports 80"}},
		}},
		{"ports in", Selection{OutboundPorts: Selector[PortRange]{Include: ports(ParsePorts("0-80"))}}, base, []Witness{
			{Flow{Address: netip.MustParseAddrPort("10.77.0.2:80")}, Verdict{true, "--include-outbound-ports 0-80"}},
			{base, Verdict{Rule: "no entry of --include-outbound-ports"}},
		}},
		{"nothing of the family", Selection{OutboundCIDRs: Selector[netip.Prefix]{Exclude: cidrs(ParseCIDRs("::/0"))}}, base6, []Witness{
			{base6, Verdict{Rule: "--exclude-outbound-cidrs ::/0"}},
		}},
		{"everything of the other", Selection{OutboundCIDRs: Selector[netip.Prefix]{Exclude: cidrs(ParseCIDRs("::/0"))}}, base, []Witness{
			{base, Verdict{true, "nothing excludes it"}},
		}},
		{"addresses in", Selection{OutboundCIDRs: Selector[netip.Prefix]{Include: cidrs(ParseCIDRs("10.99.0.0/31"))}}, base, []Witness{
			{Flow{Address: netip.MustParseAddrPort("10.99.0.1:50000")}, Verdict{true, "--include-outbound-cidrs 10.99.0.0/31"}},
			{base, Verdict{Rule: "no entry of --include-outbound-cidrs"}},
		}},
		{"users", Selection{UIDs: Selector[IDRange]{Exclude: ids(ParseIDs("0-999"))}}, base, []Witness{
			{Flow{Address: base.Address, UID: 1000}, Verdict{true, "nothing excludes it"}},
			{base, Verdict{Rule: "--exclude-uids 0-999"}},
		}},
		{"another direction's", Selection{InboundPorts: Selector[PortRange]{Exclude: ports(ParsePorts("0-65535"))}}, base, []Witness{
			{base, Verdict{true, "nothing excludes it"}},
		}},
		{"inbound", Selection{InboundPorts: Selector[PortRange]{Exclude: ports(ParsePorts("50000"))}}, in, []Witness{
			{Flow{Inbound: true, Address: netip.MustParseAddrPort("10.77.0.2:50001")}, Verdict{true, "nothing excludes it"}},
			{in, Verdict{Rule: "--exclude-inbound-ports 50000"}},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := tt.selection.Witnesses(tt.base, nil)
			for i := range max(len(got), len(tt.want)) {
				switch {
				case i >= len(got):
					t.Errorf("missing %+v", tt.want[i])
				case i >= len(tt.want) || i < len(tt.want) && got[i] != tt.want[i]:
					t.Errorf("%d: %+v", i, got[i])
				}
			}
		})
	}
}
