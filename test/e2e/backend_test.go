// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/pillionproxy/pillion/test/testnet"
)

// backend is a way to capture, as init is told of it.
type backend struct {
	name string
	args []string // none: ebpf, by the cgroup
	env  []string // of init
}

// filterBackends capture the whole network namespace by packet filters.
var filterBackends = []backend{
	{"tproxy-nft", []string{"--backend=tproxy", "--iptables=nft"}, nil},
	{"tproxy-legacy", []string{"--backend=tproxy", "--iptables=legacy"}, nil},
	{"redirect-nft", []string{"--backend=redirect", "--iptables=nft"}, nil},
	{"redirect-legacy", []string{"--backend=redirect", "--iptables=legacy"}, nil},
	{"tproxy-untracked", []string{"--backend=tproxy", "--iptables=nft"}, []string{"PILLION_TEST_WITHOUT=conntrack"}},
}

var backends = append([]backend{{name: "ebpf"}}, filterBackends...)

// untracked reports whether the backend does without connection tracking, as where nf_conntrack is not loaded.
func (b backend) untracked() bool { return len(b.env) > 0 }

func (b backend) redirects() bool { return strings.HasPrefix(b.name, "redirect") }

// newPodBy makes a pod in which nothing is installed, and which init will capture by the backend.
func newPodBy(t *testing.T, b backend) *pod {
	t.Helper()
	for _, name := range []string{"iptables-nft", "iptables-legacy", "ip6tables-nft", "ip6tables-legacy"} {
		testnet.NeedProgram(t, name, "iptables")
	}
	p := newPod(t)
	p.by = b
	return p
}

// newCapturedBy makes a pod in which init has run and the proxy is ready.
func newCapturedBy(t *testing.T, b backend, args ...string) *pod {
	t.Helper()
	p := newPodBy(t, b)
	p.init(args...)
	p.startProxyOf(b)
	return p
}

// startProxyOf starts a proxy with no more than the backend needs.
func (p *pod) startProxyOf(b backend, args ...string) {
	p.t.Helper()
	if b.redirects() {
		p.startUnprivileged(args...).waitReady()
		return
	}
	p.startProxy(inside, args...)
}

// through connects once over the path and checks that the connection went through the sidecar, and what each end saw.
func (p *pod) through(t *testing.T, w path) {
	t.Helper()
	if p.by.redirects() {
		p.redirected(t, w, w.to)
		return
	}
	p.captured(t, w)
}

// hostState is everything that a backend could leave behind.
type hostState struct {
	testnet.Snapshot
	Filters []string // of packet filters
	Sysctl  string
}

func (p *pod) hostState() hostState {
	p.t.Helper()
	s := hostState{Snapshot: p.snapshot()}
	for _, name := range []string{"iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"} {
		legacy := strings.HasSuffix(name, "legacy")
		r := run(p.t, p.ns.Command(nil, name+"-save"))
		must(p.t, name+"-save", r)
		for _, line := range strings.Split(r.stdout, "\n") {
			// A legacy table that was asked for once stays, empty; only what is in it counts. One of nft is there or not.
			if line == "" || line[0] == '#' || legacy && !strings.HasPrefix(line, "-A") && !strings.Contains(line, "PILLION") {
				continue
			}
			if chain, _, ok := strings.Cut(line, " ["); ok && line[0] == ':' {
				line = chain // without its counters
			}
			s.Filters = append(s.Filters, name+" "+line)
		}
	}
	p.ns.Do(func() {
		b, _ := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal")
		s.Sysctl = string(b)
	})
	return s
}

// wantState fails the test where two states differ.
func wantState(t *testing.T, when string, want, got hostState) {
	t.Helper()
	same(t, when, want.Snapshot, got.Snapshot)
	if !slices.Equal(want.Filters, got.Filters) || want.Sysctl != got.Sysctl {
		t.Errorf("%s: packet filters\n%s\nsysctl %q, want\n%s\nsysctl %q", when, strings.Join(got.Filters, "\n"), got.Sysctl, strings.Join(want.Filters, "\n"), want.Sysctl)
	}
}
