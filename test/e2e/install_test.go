// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pillionproxy/pillion/test/testnet"
)

// same compares two states of the pod.
func same(t testing.TB, what string, want, got testnet.Snapshot) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got)\n%s", what, diff)
	}
}

func (p *pod) snapshot() testnet.Snapshot { return p.ns.Snapshot(p.cg) }

func TestInitTwiceIsInitOnce(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	before := p.snapshot()
	p.init()
	once := p.snapshot()
	if cmp.Equal(before, once) || len(once.Programs) == 0 {
		t.Fatalf("init changed nothing that the snapshot sees: %+v", once)
	}
	p.init()
	same(t, "after the second init", once, p.snapshot())
	p.startProxy(inside)
	for _, w := range p.paths() {
		p.captured(t, w)
	}
	p.init()
	same(t, "after an init beside a running proxy", once, p.snapshot())
	p.proxy.Kill()

	must(t, "clean", p.clean())
	same(t, "after clean", before, p.snapshot())
	wantFault(t, p.clean(), 1)
	same(t, "after the second clean", before, p.snapshot())
}

func TestCleanWithoutInit(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	before := p.snapshot()
	wantFault(t, p.clean(), 1)
	same(t, "after clean", before, p.snapshot())
}

func TestTwoInitsAtOnce(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	before := p.snapshot()
	p.init()
	once := p.snapshot()
	must(t, "clean", p.clean())
	for range 5 {
		inits := []*testnet.Cmd{p.initCmd(), p.initCmd(), p.initCmd()}
		out := []*testnet.Lines{{}, {}, {}}
		for i, cmd := range inits {
			cmd.Stdout, cmd.Stderr = out[i], out[i]
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
		}
		for i, cmd := range inits {
			if err := cmd.Wait(); err != nil {
				t.Errorf("init number %d: %v\n%s", i, err, out[i])
			}
		}
		got := p.snapshot()
		// Programs and filters differ in their ids, not in their number.
		if len(got.Programs) != len(once.Programs) || len(got.Filters) != len(once.Filters) {
			t.Errorf("%d programs and %d filters, want %d and %d", len(got.Programs), len(got.Filters), len(once.Programs), len(once.Filters))
		}
		got.Programs, got.Filters = once.Programs, once.Filters
		same(t, "after three inits at once", once, got)
		must(t, "clean", p.clean())
		same(t, "after clean", before, p.snapshot())
	}
}

// TestCleanRestores: what was there before is there afterwards, exactly.
func TestCleanRestores(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		prepare func(p *pod)
	}{
		{"nothing", func(*pod) {}},
		{"a clsact of eth0", func(p *pod) { p.ns.Clsact("eth0") }},
		{"a clsact of lo", func(p *pod) { p.ns.Clsact("lo") }},
		{"a filter of somebody else", func(p *pod) { p.ns.Clsact("eth0"); p.ns.Filter("eth0", 7) }},
		{"fwmark_reflect", func(p *pod) { p.ns.Sysctl("net.ipv4.fwmark_reflect", "1") }},
		{"fwmark_reflect of IPv6", func(p *pod) { p.ns.Sysctl("net.ipv6.fwmark_reflect", "1") }},
		{"tcp_fwmark_accept", func(p *pod) { p.ns.Sysctl("net.ipv4.tcp_fwmark_accept", "1") }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPod(t)
			tt.prepare(p)
			before := p.snapshot()
			p.init()
			p.init("--on-proxy-down", "hold") // the note of the first must outlive the second
			must(t, "clean", p.clean())
			same(t, "after clean", before, p.snapshot())
		})
	}
	t.Run("a filter that came since stays, with the clsact under it", func(t *testing.T) {
		p := newPod(t)
		p.init()
		p.ns.Filter("eth0", 7)
		must(t, "clean", p.clean())
		got := p.snapshot()
		foreign := func(s string) bool { return !strings.Contains(s, "dev=eth0") }
		if len(got.Filters) == 0 || slices.ContainsFunc(got.Filters, foreign) || len(got.Programs) != 0 {
			t.Errorf("filters %q, programs %q; want the other's filter alone", got.Filters, got.Programs)
		}
		p.ns.NoClsact("eth0")
	})
	t.Run("a policy that was replaced", func(t *testing.T) {
		p := newPod(t)
		before := p.snapshot()
		p.init("--on-proxy-down", "open")
		once := p.snapshot()
		cmd := p.initCmd("--on-proxy-down", "closed", "--on-proxy-down-inbound", "closed")
		cmd.User = nil // replacing takes the right to detach
		must(t, "init with another policy", run(t, cmd))
		if got := p.snapshot(); len(got.Programs) != len(once.Programs) || len(got.Filters) != len(once.Filters) {
			t.Errorf("%d programs and %d filters after a replacement, want %d and %d", len(got.Programs), len(got.Filters), len(once.Programs), len(once.Filters))
		}
		p.down(t, policies{"closed", "closed"}, "after the replacement")
		must(t, "clean", p.clean())
		same(t, "after clean", before, p.snapshot())
	})
}

// TestReplacingAPolicyTakesTheRight: init that may not detach what is there says so, and changes nothing.
func TestReplacingAPolicyTakesTheRight(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.init("--on-proxy-down", "hold")
	once := p.snapshot()
	wantFault(t, run(t, p.initCmd("--on-proxy-down", "open")), 77, "CAP_SYS_ADMIN")
	same(t, "after the refusal", once, p.snapshot())
}

// TestInitKilledAnywhere: SIGKILL at any moment leaves what the next init makes whole, and clean takes away.
func TestInitKilledAnywhere(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	before := p.snapshot()
	start := time.Now()
	p.init()
	whole := time.Since(start)
	must(t, "clean", p.clean())
	p.startProxy(outside, "--health", "[::1]:16020") // not reachable from outside: see proxyLife
	ways := p.paths()
	killed := 0
	const times = 24
	for i := range times {
		cmd := p.initCmd()
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Spread over the whole of init; a random part, so that each run of this test tries other moments.
		select {
		case <-cmd.Done():
		case <-time.After(whole*time.Duration(i)/times + rand.N(whole/times)):
		}
		cmd.Kill()
		if cmd.ExitCode() == 128+int(syscall.SIGKILL) {
			killed++
		}
		p.init()
		for _, w := range []path{ways[0], ways[4]} {
			p.captured(t, w)
		}
		must(t, "clean", p.clean())
		same(t, "after clean", before, p.snapshot())
		if t.Failed() {
			t.Fatalf("in round %d", i)
		}
	}
	t.Logf("init takes %s; %d of %d inits were killed before their end", whole, killed, times)
	if killed < times/4 {
		t.Errorf("only %d of %d inits were killed before their end: this test shows little", killed, times)
	}
}

// TestInitFailsWhole: what init cannot finish it takes back.
func TestInitFailsWhole(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		caps []uintptr
	}{
		{"no capability", []uintptr{}},
		{"CAP_BPF alone", initUser().Caps[:1]},
		{"CAP_NET_ADMIN alone", initUser().Caps[1:]},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPod(t)
			before := p.snapshot()
			cmd := p.initCmd()
			cmd.User = &testnet.User{Caps: tt.caps}
			wantFault(t, run(t, cmd), 77, "CAP_")
			same(t, "after init failed", before, p.snapshot())
		})
	}
}

func TestDryRunChangesNothing(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	before := p.snapshot()
	text := run(t, p.initCmd("--dry-run"))
	must(t, "init --dry-run", text)
	if strings.Count(text.stdout, "\n") < 10 {
		t.Errorf("the plan is only\n%s", text.stdout)
	}
	js := run(t, p.initCmd("--dry-run", "-o", "json"))
	must(t, "init --dry-run -o json", js)
	if !json.Valid([]byte(js.stdout)) {
		t.Errorf("not JSON:\n%s", js.stdout)
	}
	same(t, "after dry runs", before, p.snapshot())
}

// TestStatusTellsTheTruth: zero only while the capture is whole.
func TestStatusTellsTheTruth(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	status := func() result { return run(t, p.pillion("status", "--cgroup", p.cg.Path)) }
	if r := status(); r.code == 0 {
		t.Errorf("before init: exit code 0\n%s", r.stdout)
	}
	p.init()
	p.startProxy(inside)
	must(t, "status of a whole capture", status())
	must(t, "verify of a whole capture", run(t, p.pillion("verify", "--cgroup", p.cg.Path)))
	js := run(t, p.pillion("status", "--cgroup", p.cg.Path, "-o", "json"))
	if js.code != 0 || !json.Valid([]byte(js.stdout)) {
		t.Errorf("exit code %d, valid JSON %v:\n%s%s", js.code, json.Valid([]byte(js.stdout)), js.stdout, js.stderr)
	}
	p.ns.NoClsact("eth0")
	if r := status(); r.code == 0 || !strings.Contains(r.stdout+r.stderr, "eth0") {
		t.Errorf("without the filters of eth0: exit code %d, want another than 0, and eth0 named\n%s%s", r.code, r.stdout, r.stderr)
	}
	mend := p.initCmd()
	mend.User = nil // another filter takes the programs that are attached, which only CAP_SYS_ADMIN may open
	must(t, "init that mends", run(t, mend))
	must(t, "status of a mended capture", status())
	for _, w := range p.paths() {
		p.captured(t, w)
	}
}
