// SPDX-License-Identifier: Apache-2.0

package config

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestJudge(t *testing.T) {
	ports, cidrs, ids, links := must[[]PortRange](t), must[[]netip.Prefix](t), must[[]IDRange](t), must[[]InterfaceName](t)
	s := Selection{
		OutboundPorts:     Selector[PortRange]{Exclude: ports(ParsePorts("0,5432,8000-8999,65535"))},
		OutboundCIDRs:     Selector[netip.Prefix]{Include: cidrs(ParseCIDRs("10.0.0.0/8,fd00::/8")), Exclude: cidrs(ParseCIDRs("10.1.2.3,fd00::1"))},
		UIDs:              Selector[IDRange]{Exclude: ids(ParseIDs("1000-1999"))},
		GIDs:              Selector[IDRange]{Include: ids(ParseIDs("0,500"))},
		InboundPorts:      Selector[PortRange]{Include: ports(ParsePorts("80,8443"))},
		InboundCIDRs:      Selector[netip.Prefix]{Exclude: cidrs(ParseCIDRs("0.0.0.0/0"))},
		InboundInterfaces: Selector[InterfaceName]{Exclude: links(ParseInterfaces("veth*,eth1"))},
		ExcludeCgroups:    []string{"/a/b"},
	}
	out := func(addr string, uid, gid uint32) Flow {
		return Flow{Address: netip.MustParseAddrPort(addr), UID: uid, GID: gid}
	}
	in := func(addr, link string) Flow {
		return Flow{Inbound: true, Address: netip.MustParseAddrPort(addr), Interface: InterfaceName(link)}
	}
	for _, tt := range []struct {
		flow Flow
		want Verdict
	}{
		{out("10.9.9.9:443", 0, 0), Verdict{true, "--include-outbound-cidrs 10.0.0.0/8"}},
		{out("[::ffff:10.9.9.9]:443", 0, 0), Verdict{true, "--include-outbound-cidrs 10.0.0.0/8"}},
		{out("11.0.0.0:443", 0, 0), Verdict{Rule: "no entry of --include-outbound-cidrs"}},
		{out("10.1.2.3:443", 0, 0), Verdict{Rule: "--exclude-outbound-cidrs 10.1.2.3/32"}},
		{out("10.1.2.4:443", 0, 500), Verdict{true, "--include-outbound-cidrs 10.0.0.0/8"}},
		{out("[fd00::1]:443", 0, 0), Verdict{Rule: "--exclude-outbound-cidrs fd00::1/128"}},
		{out("10.1.2.3:5432", 1000, 7), Verdict{Rule: "--exclude-outbound-ports 5432"}},
		{out("10.9.9.9:7999", 0, 0), Verdict{true, "--include-outbound-cidrs 10.0.0.0/8"}},
		{out("10.9.9.9:8000", 0, 0), Verdict{Rule: "--exclude-outbound-ports 8000-8999"}},
		{out("10.9.9.9:8999", 0, 0), Verdict{Rule: "--exclude-outbound-ports 8000-8999"}},
		{out("10.9.9.9:9000", 0, 0), Verdict{true, "--include-outbound-cidrs 10.0.0.0/8"}},
		{out("10.9.9.9:0", 0, 0), Verdict{Rule: "--exclude-outbound-ports 0"}},
		{out("10.9.9.9:65535", 0, 0), Verdict{Rule: "--exclude-outbound-ports 65535"}},
		{out("10.9.9.9:443", 1999, 0), Verdict{Rule: "--exclude-uids 1000-1999"}},
		{out("10.9.9.9:443", 2000, 0), Verdict{true, "--include-outbound-cidrs 10.0.0.0/8"}},
		{out("10.9.9.9:443", 0, 501), Verdict{Rule: "no entry of --include-gids"}},
		{in("[fd00::1]:80", "eth0"), Verdict{true, "--include-inbound-ports 80"}},
		{in("[fd00::1]:81", "eth0"), Verdict{Rule: "no entry of --include-inbound-ports"}},
		{in("10.0.0.1:80", "eth0"), Verdict{Rule: "--exclude-inbound-cidrs 0.0.0.0/0"}},
		{in("[fd00::1]:80", "veth7"), Verdict{Rule: "--exclude-inbound-interfaces veth*"}},
		{in("[fd00::1]:80", "eth1"), Verdict{Rule: "--exclude-inbound-interfaces eth1"}},
		{in("[fd00::1]:80", "eth10"), Verdict{true, "--include-inbound-ports 80"}},
		{Flow{Inbound: true, Cgroup: "/a/b/c"}, Verdict{Rule: "--exclude-cgroups /a/b"}},
		{Flow{Cgroup: "/a/b"}, Verdict{Rule: "--exclude-cgroups /a/b"}},
	} {
		if got := s.Judge(tt.flow); got != tt.want {
			t.Errorf("%+v: %+v, want %+v", tt.flow, got, tt.want)
		}
	}
	if got, want := (Selection{}).Judge(out("1.2.3.4:5", 6, 7)), (Verdict{true, "nothing excludes it"}); got != want {
		t.Errorf("of an empty selection: %+v, want %+v", got, want)
	}
	var again Selection
	b, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &again); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(s, again, cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
		t.Errorf("through JSON (-want +got):\n%s", diff)
	}
}

func TestParseEntriesRefusesWithTheReason(t *testing.T) {
	for _, tt := range []struct {
		parse func(string) error
		in    string
		want  string
	}{
		{parser(ParsePorts), "65536", "from 0 to 65535"},
		{parser(ParsePorts), "90-80", "neither a port nor a range"},
		{parser(ParsePorts), "80,,443", "empty entry"},
		{parser(ParsePorts), "http", "neither a port"},
		{parser(ParsePorts), "-1", "neither a port"},
		{parser(ParsePorts), "", "empty entry"},
		{parser(ParseCIDRs), "10.0.0.1/8", "did you mean 10.0.0.0/8"},
		{parser(ParseCIDRs), "10.0.0.0/33", "neither an address nor a prefix"},
		{parser(ParseCIDRs), "::ffff:10.0.0.0/104", "write it as IPv4"},
		{parser(ParseCIDRs), "fe80::1%eth0", "zone"},
		{parser(ParseCIDRs), "example.com", "neither an address"},
		{parser(ParseIDs), "4294967295", "neither a numeric id"},
		{parser(ParseIDs), "root", "id -u NAME"},
		{parser(ParseInterfaces), "eth0+", "write eth0"},
		{parser(ParseInterfaces), "a*b", "no interface name"},
		{parser(ParseInterfaces), "sixteen-letters-", "no interface name"},
		{parser(ParseInterfaces), "e th", "no interface name"},
	} {
		if err := tt.parse(tt.in); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: %v, want an error with %q", tt.in, err, tt.want)
		}
	}
}

func parser[T any](parse func(string) ([]T, error)) func(string) error {
	return func(s string) error { _, err := parse(s); return err }
}

func TestMerged(t *testing.T) {
	in := []PortRange{{8000, 8999}, {80, 80}, {81, 90}, {8500, 9000}, {65535, 65535}, {0, 0}}
	want := []PortRange{{0, 0}, {80, 90}, {8000, 9000}, {65535, 65535}}
	if diff := cmp.Diff(want, Merged(in)); diff != "" {
		t.Error(diff)
	}
}

func FuzzEntries(f *testing.F) {
	f.Add("80,443,8000-8999")
	f.Add("10.0.0.0/8,fd00::/8,::ffff:1.2.3.4")
	f.Add("eth0,veth*")
	f.Fuzz(func(t *testing.T, s string) {
		if list, err := ParsePorts(s); err == nil {
			for _, r := range list {
				again, err := ParsePorts(r.String())
				if err != nil || again[0] != r {
					t.Errorf("%v became %v, %v", r, again, err)
				}
			}
		}
		if list, err := ParseCIDRs(s); err == nil {
			for _, p := range list {
				if p != p.Masked() || p.Addr().Is4In6() {
					t.Errorf("%q gave %v", s, p)
				}
			}
		}
		_, _ = ParseIDs(s)
		_, _ = ParseInterfaces(s)
	})
}
