// SPDX-License-Identifier: Apache-2.0

package rootless

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"gotest.tools/v3/golden"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func via(to, source string) Destination {
	return Destination{netip.MustParsePrefix(to), addr(source)}
}

// TestPlan: what is done on a host of both families, on one without IPv6, and on one without any network.
func TestPlan(t *testing.T) {
	ports := Ports{TCP: 16001, UDP: 16001}
	for name, h := range map[string]Host{
		"both": {
			Addresses: []netip.Addr{addr("192.0.2.2"), addr("10.0.0.1"), addr("2001:db8::2")},
			Routes:    []Destination{via("0.0.0.0/0", "192.0.2.2"), via("10.0.0.0/8", "10.0.0.1"), via("::/0", "2001:db8::2")},
		},
		"v4":   {Addresses: []netip.Addr{addr("192.0.2.2")}, Routes: []Destination{via("0.0.0.0/0", "192.0.2.2")}, NoIPv6: true},
		"none": {},
	} {
		t.Run(name, func(t *testing.T) {
			var b strings.Builder
			if err := MakePlan(h, ports).WriteText(&b); err != nil {
				t.Fatal(err)
			}
			golden.Assert(t, b.String(), name+".golden")
		})
	}
}

// TestIntervals: a set's element has its end behind it, but for the one that reaches the last address.
func TestIntervals(t *testing.T) {
	for prefix, want := range map[string][]string{
		"127.0.0.0/8":       {"127.0.0.0", "128.0.0.0"},
		"192.0.2.2/32":      {"192.0.2.2", "192.0.2.3"},
		"224.0.0.0/3":       {"224.0.0.0"},
		"::1/128":           {"::1", "::2"},
		"ff00::/8":          {"ff00::"},
		"2001:db8:0:8::/61": {"2001:db8:0:8::", "2001:db8:0:10::"},
	} {
		var got []string
		for i, e := range intervals([]netip.Prefix{netip.MustParsePrefix(prefix)}) {
			a, _ := netip.AddrFromSlice(e.Key)
			if e.IntervalEnd != (i == 1) {
				t.Errorf("%s: element %d ends: %v", prefix, i, e.IntervalEnd)
			}
			got = append(got, a.String())
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", prefix, diff)
		}
	}
}

// TestShorten: what a wider destination says with the same source is left out, and nothing else.
func TestShorten(t *testing.T) {
	all := []Destination{
		via("10.1.2.0/24", "10.0.0.1"), via("0.0.0.0/0", "192.0.2.2"), via("10.0.0.0/8", "10.0.0.1"), via("192.0.2.0/24", "192.0.2.2"),
		via("10.1.0.0/16", "192.0.2.2"), via("10.1.2.3/32", "10.0.0.1"), via("2001:db8::/32", "2001:db8::2"), via("10.0.0.0/8", "10.0.0.9"),
	}
	want := []Destination{
		via("0.0.0.0/0", "192.0.2.2"), via("10.0.0.0/8", "10.0.0.1"), via("10.1.0.0/16", "192.0.2.2"), via("10.1.2.0/24", "10.0.0.1"),
		via("2001:db8::/32", "2001:db8::2"),
	}
	byText := cmp.Comparer(func(a, b Destination) bool { return a == b })
	sortBy := func(list []Destination) []Destination {
		slices.SortFunc(list, func(a, b Destination) int { return strings.Compare(a.To.String(), b.To.String()) })
		return list
	}
	if diff := cmp.Diff(sortBy(want), sortBy(shorten(all)), byText); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
