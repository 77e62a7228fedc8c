// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// serveLoad starts a server on loopback and returns where. It serves until the tests end.
func serveLoad(t *testing.T, apps string) netip.AddrPort {
	t.Helper()
	s, err := newLoadServer(netip.MustParseAddrPort("127.0.0.1:0"), netip.MustParsePrefix(apps))
	if err != nil {
		t.Fatal(err)
	}
	local, err := unix.Getsockname(s.listener)
	if err != nil {
		t.Fatal(err)
	}
	go func() { t.Error(s.serve()) }()
	return netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(local.(*unix.SockaddrInet4).Port))
}

func TestLoad(t *testing.T) {
	target := serveLoad(t, "127.9.0.0/16")
	for name, c := range map[string]loadClient{
		"small":  {answer: 128, parallel: 8, warmup: 3},
		"bulk":   {answer: 3<<20 + 1, parallel: 2, warmup: 1},
		"new":    {answer: 128, parallel: 8, warmup: 3, fresh: true},
		"hold":   {answer: 128, parallel: 8, hold: []int{5, 50}},
		"poll":   {answer: 128, poll: true},
		"byPeer": {answer: 128, parallel: 1, warmup: 1, carried: true, sources: netip.MustParsePrefix("127.1.0.0/24")},
	} {
		t.Run(name, func(t *testing.T) {
			c.target, c.window = target, 50*time.Millisecond
			if !c.sources.IsValid() {
				c.sources = netip.MustParsePrefix("127.9.0.0/24")
			}
			var out bytes.Buffer
			if err := c.run(strings.NewReader("\n\n"), &out); err != nil {
				t.Fatal(err)
			}
			var ready, s loadSample
			samples := json.NewDecoder(&out)
			if err := samples.Decode(&ready); err != nil || ready != (loadSample{}) {
				t.Fatalf("at first: %+v, %v", ready, err)
			}
			if err := samples.Decode(&s); err != nil {
				t.Fatal(err)
			}
			if err := samples.Decode(&loadSample{}); err != io.EOF {
				t.Errorf("after the last sample: %v", err)
			}
			switch name {
			case "hold":
				if c.dialled != 50 {
					t.Errorf("%d connections, want 50", c.dialled)
				}
			case "poll":
				if s.Until == 0 {
					t.Error("no time of the answer")
				}
			default:
				if s.Exchanges < c.parallel || s.Seconds < c.window.Seconds() || s.P50 <= 0 || s.P99 < s.P50 {
					t.Errorf("%+v", s)
				}
				if got := c.dialled > c.parallel; got != c.fresh {
					t.Errorf("%d connections for %d exchanges", c.dialled, s.Exchanges)
				}
			}
		})
	}
}

func TestLoadNoticesABypass(t *testing.T) {
	c := loadClient{
		target: serveLoad(t, "127.9.0.0/16"), sources: netip.MustParsePrefix("127.9.0.0/24"),
		answer: 128, parallel: 1, warmup: 1, carried: true,
	}
	if err := c.run(strings.NewReader(""), io.Discard); err == nil || !strings.Contains(err.Error(), "came by a sidecar: false, expected true") {
		t.Errorf("a connection past the proxy: %v", err)
	}
}

func TestLoadFailsWithoutAServer(t *testing.T) {
	c := loadClient{
		target: netip.MustParseAddrPort("127.0.0.1:1"), sources: netip.MustParsePrefix("127.9.0.0/24"),
		answer: 128, parallel: 1, warmup: 1,
	}
	if err := c.run(strings.NewReader(""), io.Discard); err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("nobody listens: %v", err)
	}
}

func TestQuantile(t *testing.T) {
	hundred := make([]time.Duration, 100)
	for i := range hundred {
		hundred[i] = time.Duration(i + 1)
	}
	for part, want := range map[float64]time.Duration{0.5: 50, 0.99: 99, 1: 100, 0: 1} {
		if got := quantile(hundred, part); got != want {
			t.Errorf("quantile(%v) = %d, want %d", part, got, want)
		}
	}
}
