// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"math"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pillionproxy/pillion/bpf"
	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
)

func TestNoteIsReadAsWritten(t *testing.T) {
	for _, n := range []note{
		{Slot: 0, Plan: "8d2f6a01", CgroupID: 4711, Hooks: []uint32{1, 2, 3, 4, 5, 6}, Sysctls: []string{"0", "0", "0"}},
		{Slot: 7, Plan: heldPlan, CgroupID: 1, Clsact: true, Fixed: true, Dial: config.DialInbound, Sysctls: []string{"1", "0", ""}, Down: [2]config.FailureMode{config.Open, config.Closed}, Ports: config.Listeners{Outbound: 1, Inbound: 65535, InboundOwn: 3}},
	} {
		got, ok := parseNote(n.String())
		if !ok {
			t.Errorf("%q is not read as a note", n)
		}
		if diff := cmp.Diff(n, got); diff != "" {
			t.Errorf("%q: -want +got:\n%s", n, diff)
		}
	}
}

// The kernel keeps 255 bytes of a filter's name (CLS_BPF_NAME_LEN).
func TestTheLongestNoteFitsAFilterName(t *testing.T) {
	id := uint32(math.MaxUint32)
	n := note{
		Slot: config.Slots - 1, Plan: "ffffffff", CgroupID: math.MaxUint64, Hooks: []uint32{id, id, id, id, id, id}, Clsact: true,
		Ports:   config.Listeners{Outbound: 65535, Inbound: 65535, InboundOwn: 65535},
		Down:    [2]config.FailureMode{config.Closed, config.Closed},
		Dial:    config.PortRange{First: 65535, Last: 65535},
		Sysctls: []string{"1", "1", "1", "1"},
	}
	if len(n.String()) > 255 {
		t.Errorf("%d bytes: %s", len(n.String()), n)
	}
}

func FuzzParseNote(f *testing.F) {
	f.Add("pillion slot=0 plan=8d2f6a01 cgroup=4711 hooks=12,13 ports=1,2,3 down=hold,open clsact=true sysctl=0,0,0")
	f.Add("pillion slot=99")
	f.Add("cilium-host")
	f.Fuzz(func(t *testing.T, name string) {
		if n, ok := parseNote(name); ok && n.Slot >= config.Slots {
			t.Errorf("%q: slot %d", name, n.Slot)
		}
	})
}

func TestPlanHashCoversThePolicy(t *testing.T) {
	hash := func(p config.Capture, without bpf.CaptureCure) string {
		t.Helper()
		h, err := planHash(redirect.Plan{Policy: p}, without)
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	policy := config.DefaultCapture()
	base := hash(policy, 0)
	if again := hash(policy, 0); again != base {
		t.Errorf("the same policy: %s, then %s", base, again)
	}
	policy.Cgroup = "/known/by/its/id"
	if h := hash(policy, 0); h != base {
		t.Error("the name of the cgroup is in the hash")
	}
	for name, change := range map[string]func(*config.Capture){
		"policy":    func(p *config.Capture) { p.OnProxyDown = config.Open },
		"port":      func(p *config.Capture) { p.Listeners.Inbound++ },
		"range":     func(p *config.Capture) { p.DialInbound.Last-- },
		"uid":       func(p *config.Capture) { p.ProxyUID++ },
		"selection": func(p *config.Capture) { p.Selection.ExcludeCgroups = []string{"/a"} },
	} {
		changed := config.DefaultCapture()
		change(&changed)
		if hash(changed, 0) == base {
			t.Errorf("another %s, the same hash", name)
		}
	}
	if hash(config.DefaultCapture(), bpf.CaptureCureCURE_GUARD) == base {
		t.Error("a cure taken out, the same hash")
	}
}

func TestEveryCounterHasAName(t *testing.T) {
	names, err := counterNames()
	if err != nil {
		t.Fatal(err)
	}
	if len(names) != int(bpf.CaptureCounterCOUNT_MAX) {
		t.Errorf("%d names for %d counters", len(names), bpf.CaptureCounterCOUNT_MAX)
	}
	if names[bpf.CaptureCounterCOUNT_GUARDED] != "guarded" {
		t.Errorf("COUNT_GUARDED is called %q", names[bpf.CaptureCounterCOUNT_GUARDED])
	}
}
