// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect/check"
	"github.com/vishvananda/netlink"
)

// check runs `pillion check` as root.
func (p *pod) check(args ...string) check.Report {
	p.t.Helper()
	r := run(p.t, p.pillion(append([]string{"check", "-o", "json", "--cgroup", p.appCG.Path}, args...)...))
	var report check.Report
	if err := json.Unmarshal([]byte(r.stdout), &report); err != nil {
		p.t.Fatalf("check: %v\n%s%s", err, r.stdout, r.stderr)
	}
	return report
}

// wantRow checks one row of a report.
func wantRow(t *testing.T, r check.Report, what string, state check.State, says string) {
	t.Helper()
	for _, row := range r.Rows {
		if row.What != what {
			continue
		}
		if row.State != state || !strings.Contains(row.Detail, says) {
			t.Errorf("row %q is %s: %s; want %s: %s", what, row.State, row.Detail, state, says)
		}
		return
	}
	t.Errorf("there is no row %q", what)
}

func wantUsable(t *testing.T, r check.Report, b check.Backend, want check.Usable) {
	t.Helper()
	for _, v := range r.Verdicts {
		if v.Backend == b && v.Usable != want {
			t.Errorf("%s is %s %q, want %s", b, v.Usable, v.Reasons, want)
		}
	}
}

// An exclusive program on a cgroup above keeps every other off; init fails then, and check says so before.
func TestCheckSeesAnExclusiveProgramAbove(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	program := connectProgram(t)
	for _, tt := range []struct {
		flags uint32
		state check.State
		ebpf  check.Usable
		init  int
	}{
		{0, check.Conflict, check.No, config.ExitUnavailable},
		{uint32(ebpfAllowOverride), check.Conflict, check.Limited, 0},
	} {
		attachWith(t, p.cg.Path, program, tt.flags, func() {
			r := p.check()
			wantRow(t, r, "others' programs", tt.state, "connect4 of "+p.cg.Path)
			wantUsable(t, r, check.EBPF, tt.ebpf)
			got := run(t, p.pillion("init", "--no-verify", "--cgroup", p.appCG.Path, "--ignore-open-listeners"))
			if got.code != tt.init {
				t.Errorf("init ends with %d, want %d: %s", got.code, tt.init, got.stderr)
			}
			if got.code == 0 {
				must(t, "clean", run(t, p.pillion("clean", "--cgroup", p.appCG.Path)))
			}
		})
	}
	wantRow(t, p.check(), "others' programs", check.OK, "none")
}

const ebpfAllowOverride = 1 // BPF_F_ALLOW_OVERRIDE, linux/bpf.h

// connectProgram is a program that lets every connect(2) pass.
func connectProgram(t *testing.T) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// attachWith attaches the program to a cgroup while f runs.
func attachWith(t *testing.T, path string, p *ebpf.Program, flags uint32, f func()) {
	t.Helper()
	dir, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	at := link.RawAttachProgramOptions{Target: int(dir.Fd()), Program: p, Attach: ebpf.AttachCGroupInet4Connect, Flags: flags}
	if err := link.RawAttachProgram(at); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := link.RawDetachProgram(link.RawDetachProgramOptions{Target: at.Target, Program: p, Attach: at.Attach}); err != nil {
			t.Error(err)
		}
	}()
	f()
}

// Others in the network namespace: rules that read our mark bits or stand in our place, a listener on our port, and the
// chains of another mesh in either flavour of iptables. Looking at them changes none of them.
func TestCheckSeesNeighbours(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	if run(t, p.ns.Command(nil, "iptables-nft", "-V")).code != 0 {
		t.Skip("there is no iptables-nft")
	}
	before := p.packetFilters()
	r := p.check()
	wantUsable(t, r, check.EBPF, check.Full)
	wantRow(t, r, "another mesh", check.OK, "none")
	if diff := cmp.Diff(before, p.packetFilters()); diff != "" {
		t.Errorf("packet filters were changed (-want +got):\n%s", diff)
	}

	for _, command := range [][]string{
		{"iptables-nft", "-t", "nat", "-N", "ISTIO_OUTPUT"},
		{"iptables-nft", "-t", "nat", "-A", "OUTPUT", "-j", "ISTIO_OUTPUT"},
		{"ip6tables-legacy", "-t", "nat", "-N", "PROXY_INIT_OUTPUT"},
	} {
		must(t, strings.Join(command, " "), run(t, p.ns.Command(nil, command[0], command[1:]...)))
	}
	p.ns.Do(func() {
		rule := netlink.NewRule()
		mask := uint32(1) << 30
		rule.Priority, rule.Mark, rule.Mask, rule.Table = 9, mask, &mask, 7
		if err := netlink.RuleAdd(rule); err != nil {
			t.Fatal(err)
		}
		rule = netlink.NewRule()
		rule.Priority, rule.IifName, rule.Table = 65, "eth0", 7
		if err := netlink.RuleAdd(rule); err != nil {
			t.Fatal(err)
		}
	})
	l := p.ns.Listen("tcp", "127.0.0.1:16001")
	defer l.Close()

	before = p.packetFilters()
	r = p.check()
	wantRow(t, r, "another mesh", check.Conflict, "Istio: ISTIO_OUTPUT (nft ip); Linkerd: PROXY_INIT_OUTPUT (legacy ip6)")
	wantRow(t, r, "mark bits 0x70000000", check.Conflict, "IPv4 rule 9 (fwmark 0x40000000/0x40000000, table 7)")
	wantRow(t, r, "rule priorities 60-69", check.Conflict, "IPv4 rule 65 (some packets, table 7)")
	wantRow(t, r, "the proxy's ports", check.Conflict, "16001 by ")
	wantUsable(t, r, check.EBPF, check.No)
	if diff := cmp.Diff(before, p.packetFilters()); diff != "" {
		t.Errorf("packet filters were changed (-want +got):\n%s", diff)
	}
	r = p.check("--slot", "1", "--outbound-port", "16101")
	wantRow(t, r, "mark bits 0xe000000", check.OK, "")
	wantUsable(t, r, check.EBPF, check.Limited)
}

// packetFilters is all of them: the rules of nftables, and the tables of iptables-legacy that exist.
func (p *pod) packetFilters() []string {
	p.t.Helper()
	var all []string
	for _, program := range []string{"iptables-nft-save", "ip6tables-nft-save"} {
		for line := range strings.Lines(run(p.t, p.ns.Command(nil, program)).stdout) {
			if !strings.HasPrefix(line, "#") { // the time
				all = append(all, line)
			}
		}
	}
	p.ns.Do(func() {
		for _, name := range []string{"ip_tables_names", "ip6_tables_names"} {
			b, err := os.ReadFile("/proc/thread-self/net/" + name)
			if err != nil && !os.IsNotExist(err) {
				p.t.Fatal(err)
			}
			all = append(all, name+": "+string(b))
		}
	})
	return all
}
