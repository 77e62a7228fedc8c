// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
)

// TestExplain: what explain says of a connection is what becomes of it, and the policy that it goes by is the one that is
// installed; status shows it, and verify tries each part of it without being told.
func TestExplain(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.init("--exclude-outbound-ports=8000-8999", "--include-inbound-ports=80,443", "--exclude-uids=1000", "--on-proxy-down=closed")
	for _, tt := range []struct {
		args string
		want string
	}{
		{"10.99.0.1:443", "captured: nothing excludes it (slot 0, backend ebpf; while no proxy listens: closed)"},
		{"[fd99::1]:443", "captured: nothing excludes it (slot 0, backend ebpf; while no proxy listens: closed)"},
		{"10.99.0.1:8999", "left alone: --exclude-outbound-ports 8000-8999 (slot 0, backend ebpf)"},
		{"10.99.0.1:443 --uid 1000", "left alone: --exclude-uids 1000 (slot 0, backend ebpf)"},
		{"10.99.0.1:443 --uid 1666", "left alone: --proxy-uid 1666: the proxy's own connection, from its ports 20000-26999 or 27000-32767; from any other it is an app's (slot 0, backend ebpf)"},
		{"127.0.0.1:443", "left alone: an address of this host: such a connection never leaves it (slot 0, backend ebpf)"},
		{pod4 + ":443", "left alone: an address of this host: such a connection never leaves it (slot 0, backend ebpf)"},
		{"10.99.0.1:80 --inbound", "captured: --include-inbound-ports 80 (slot 0, backend ebpf; while no proxy listens: hold)"},
		{"10.99.0.1:81 --inbound", "left alone: no entry of --include-inbound-ports (slot 0, backend ebpf)"},
		{"10.99.0.1:16006 --inbound", "left alone: a listener of the proxy itself (slot 0, backend ebpf)"},
		{"10.99.0.1:443 --exclude-outbound-cidrs 10.0.0.0/8", "left alone: --exclude-outbound-cidrs 10.0.0.0/8 (these flags)"},
	} {
		r := run(t, p.pillion(append([]string{"explain"}, strings.Fields(tt.args)...)...))
		must(t, "explain "+tt.args, r)
		if got := strings.TrimSpace(r.stdout); got != tt.want {
			t.Errorf("explain %s: %q, want %q", tt.args, got, tt.want)
		}
	}

	r := run(t, p.pillion("status"))
	must(t, "status", r)
	for _, want := range []string{"--exclude-outbound-ports=8000-8999\n", "--exclude-uids=1000\n", "--include-inbound-ports=80,443\n"} {
		if !strings.Contains(r.stdout, want) {
			t.Errorf("status does not say %q:\n%s", want, r.stdout)
		}
	}

	r = run(t, p.pillion("verify", "-o", "json"))
	must(t, "verify", r)
	var checks []redirect.Check
	if err := json.Unmarshal([]byte(r.stdout), &checks); err != nil {
		t.Fatal(err)
	}
	tried := map[string]int{}
	for _, c := range checks {
		if c.OK && c.Proven {
			tried[c.Rule]++
		}
	}
	for rule, want := range map[string]int{ // in each family; and mapped, of what is captured
		"nothing excludes it":                 3,
		"--exclude-outbound-ports 8000-8999":  2,
		"--exclude-uids 1000":                 2,
		"--include-inbound-ports 80":          2,
		"no entry of --include-inbound-ports": 2,
	} {
		if tried[rule] != want {
			t.Errorf("verify proved %q %d times, want %d:\n%s", rule, tried[rule], want, r.stdout)
		}
	}

	wantFault(t, run(t, p.pillion("explain", "example.com:80")), config.ExitUsage, "is not an address and a port")
	must(t, "clean", p.clean())
	wantFault(t, run(t, p.pillion("explain", "10.0.0.1:80")), config.ExitFailure, "nothing of pillion is installed")
}
