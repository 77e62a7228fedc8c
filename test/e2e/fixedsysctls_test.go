// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"testing"

	"github.com/pillionproxy/pillion/config"
	"golang.org/x/sys/unix"
)

// readOnlySysctls runs what follows it with /proc/sys mounted read-only, as in a pod that is not privileged.
var readOnlySysctls = []string{
	"--mount", "--propagation", "private", "/bin/sh", "-c",
	`mount --bind /proc/sys /proc/sys && mount -o remount,ro,bind /proc/sys && exec "$@"`, "sh",
}

// TestSysctlsMayNotBeWritten: where init cannot set the sysctls, a rule for the ports of the proxy's dials is in their
// place. Row 28.
func TestSysctlsMayNotBeWritten(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	before := p.snapshot()
	args := append(readOnlySysctls, pillionPath, "init", "--cgroup", p.cg.Path)
	must(t, "init", run(t, p.ns.Command(nil, "unshare", args...)))
	if value := p.ns.SysctlValue("net.ipv4.fwmark_reflect"); value != "0" {
		t.Fatalf("net.ipv4.fwmark_reflect is %s: it was not read-only, this test shows nothing", value)
	}
	if wrong := p.wrong(); len(wrong) > 0 {
		t.Errorf("status: %v", wrong)
	}
	p.startProxy(inside, "--connect-timeout", "2s") // what the last part waits for
	for _, w := range p.paths() {
		p.captured(t, w)
	}
	t.Run("without the cure", func(t *testing.T) {
		p.removePortRule()
		w := p.paths()[3]
		a := p.attempt(w) // the proxy takes it, but its dial to the app gets no answer
		a.wait(t)
		if a.err == nil {
			defer a.c.Close()
			if err := exchange(a.c, "x"); err == nil {
				t.Error("an inbound connection works without the rule")
			}
		}
	})
	must(t, "clean", p.clean())
	same(t, "after clean", before, p.snapshot())
}

func (p *pod) removePortRule() {
	p.t.Helper()
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := p.ns.Netlink().RuleList(family)
		if err != nil {
			p.t.Fatal(err)
		}
		for _, r := range rules {
			if r.Dport == nil || r.Priority < config.Slot(0).RulePriority() || r.Priority >= config.Slot(1).RulePriority() {
				continue
			}
			r.Family = family
			if err := p.ns.Netlink().RuleDel(&r); err != nil {
				p.t.Fatalf("remove %s: %v", r, err)
			}
		}
	}
}
