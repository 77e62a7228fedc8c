// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
)

func TestNeighbourIsNobodyOfThisHost(t *testing.T) {
	for _, tt := range []struct {
		prefix string
		ours   []string
		want   string
	}{
		{"10.77.0.2/24", []string{"10.77.0.2"}, "10.77.0.1"},
		{"10.77.0.1/24", []string{"10.77.0.1", "10.77.0.2"}, "10.77.0.3"},
		{"10.0.0.1/30", []string{"10.0.0.1"}, "10.0.0.2"},
		{"10.0.0.1/31", []string{"10.0.0.1"}, "192.0.2.1"},
		{"10.0.0.1/32", []string{"10.0.0.1"}, "192.0.2.1"},
		{"fd77::2/64", []string{"fd77::2"}, "fd77::1"},
		{"fd77::2/128", []string{"fd77::2"}, "2001:db8::1"},
	} {
		var ours []netlink.Addr
		for _, a := range tt.ours {
			ours = append(ours, netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(a)}})
		}
		if got := neighbour(netip.MustParsePrefix(tt.prefix), ours); got.String() != tt.want {
			t.Errorf("neighbour of %s beside %v: %s, want %s", tt.prefix, tt.ours, got, tt.want)
		}
	}
}
