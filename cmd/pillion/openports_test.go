// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/pillionproxy/pillion/redirect"
)

// TestOpenPorts: on which ports a command listens, and where it is met.
func TestOpenPorts(t *testing.T) {
	const ours = 15001
	local4, local6 := netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()
	port := func(n uint16, v4, v6 netip.Addr) openPort { return openPort{n, v4, v6} }
	var none netip.Addr
	for _, tt := range []struct {
		sockets []string
		want    []openPort
	}{
		{nil, nil},
		{[]string{"127.0.0.1:15001", "[::1]:15001"}, nil},
		{[]string{"0.0.0.0:80"}, []openPort{port(80, local4, none)}},
		{[]string{"[::]:80"}, []openPort{port(80, local4, local6)}},
		{[]string{"[::ffff:127.0.0.1]:80"}, []openPort{port(80, local4, none)}},
		{[]string{"10.0.0.2:80", "[fd00::2]:80"}, []openPort{port(80, netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2"))}},
		{[]string{"127.0.0.1:80", "10.0.0.2:80"}, []openPort{port(80, local4, none)}},
		{[]string{"10.0.0.2:80", "0.0.0.0:80"}, []openPort{port(80, local4, none)}},
		{[]string{"[::1]:443", "127.0.0.1:80"}, []openPort{port(80, local4, none), port(443, none, local6)}},
	} {
		var sockets []redirect.Listening
		for _, s := range tt.sockets {
			sockets = append(sockets, redirect.Listening{Local: netip.MustParseAddrPort(s)})
		}
		if got := openPorts(sockets, ours); !slices.Equal(got, tt.want) {
			t.Errorf("%q: %v, want %v", tt.sockets, got, tt.want)
		}
	}
}
