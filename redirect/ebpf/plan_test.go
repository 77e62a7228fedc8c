// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"bytes"
	"testing"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"gotest.tools/v3/golden"
)

func TestPlanIsWhatTheGoldenFilesSay(t *testing.T) {
	lo := redirect.Interface{Index: 1, Name: "lo", Loopback: true, Up: true, IPv6: true}
	eth0 := redirect.Interface{Index: 2, Name: "eth0", Up: true, Ethernet: true, IPv6: true}
	policy := config.DefaultCapture()
	policy.Cgroup = "/sys/fs/cgroup/pod"
	fast := policy
	fast.OnProxyDown, fast.OnProxyDownInbound = config.Open, config.Closed
	third := policy
	third.Slot = 3
	for _, tt := range []struct {
		name     string
		policy   config.Capture
		host     redirect.Host
		lifetime redirect.Lifetime
	}{
		{"pod", policy, redirect.Host{Interfaces: []redirect.Interface{lo, eth0}, IPv6: true}, redirect.Persistent},
		{"policies", fast, redirect.Host{Interfaces: []redirect.Interface{lo, eth0}, IPv6: true}, redirect.Persistent},
		{"slot", third, redirect.Host{Interfaces: []redirect.Interface{lo, eth0}, IPv6: true}, redirect.Held},
		{"fixed-sysctls", policy, redirect.Host{Interfaces: []redirect.Interface{lo, eth0}, IPv6: true, FixedSysctls: true}, redirect.Persistent},
		{"no-ipv6", policy, redirect.Host{Interfaces: []redirect.Interface{{Index: 1, Name: "lo", Loopback: true, Up: true}, {Index: 2, Name: "eth0", Up: true, Ethernet: true}}}, redirect.Persistent},
		{"no-ipv6-on-one", policy, redirect.Host{Interfaces: []redirect.Interface{lo, {Index: 2, Name: "eth0", Up: true, Ethernet: true}}, IPv6: true}, redirect.Persistent},
		{"interfaces", policy, redirect.Host{Interfaces: []redirect.Interface{
			lo, eth0,
			{Index: 5, Name: "down0", Ethernet: true, IPv6: true},
			{Index: 7, Name: "tun0", Up: true, IPv6: true},
		}, IPv6: true}, redirect.Persistent},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got bytes.Buffer
			if err := Plan(tt.policy, tt.host, tt.lifetime).WriteText(&got); err != nil {
				t.Fatal(err)
			}
			golden.Assert(t, got.String(), tt.name+".plan")
		})
	}
}

// The capture must begin with the last hook, so that a half installed one captures nothing.
func TestTheHookThatMarksIsTheLast(t *testing.T) {
	if last := hooks[len(hooks)-1]; last.Attach != "sock_ops" {
		t.Errorf("the last hook is %s", last.Attach)
	}
}

func TestSlotsDoNotOverlap(t *testing.T) {
	marks := uint32(0)
	tables, priorities := map[int]bool{}, map[int]bool{}
	for s := config.Slot(0); s < config.Slots; s++ {
		if marks&s.Mask() != 0 {
			t.Errorf("slot %d: mark bits %#x are another slot's", s, s.Mask())
		}
		marks |= s.Mask()
		for _, table := range []int{s.TableCapture(), s.TableClosed()} {
			if tables[table] || table >= 253 { // default, main and local follow
				t.Errorf("slot %d: table %d is in use", s, table)
			}
			tables[table] = true
		}
		for _, r := range redirect.MarkRules(s, redirect.IPv4) {
			if priorities[r.Priority] || r.Priority >= 32766 {
				t.Errorf("slot %d: rule priority %d is in use", s, r.Priority)
			}
			priorities[r.Priority] = true
			if r.Mark&^s.Mask() != 0 || r.Mask&^s.Mask() != 0 {
				t.Errorf("slot %d: rule %d tests bits outside of the slot", s, r.Priority)
			}
		}
	}
}
