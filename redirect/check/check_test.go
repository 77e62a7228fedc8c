// SPDX-License-Identifier: Apache-2.0

package check

import (
	"encoding/json"
	"maps"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/ebpf"
	"gotest.tools/v3/golden"
)

// root is a machine of today, seen as root: each case says how it differs.
func root() Facts {
	ok := Answer{State: OK}
	f := Facts{
		Kernel: "6.12.0-test", Machine: "x86_64",
		Cgroup: Cgroup{
			V2: []Mount{{Point: "/sys/fs/cgroup", Root: "/"}}, Own: "/", PrivateNS: Answer{State: OK, Detail: "the host's"},
			Given: true, Target: "/sys/fs/cgroup/system.slice/shop.service", Writable: ok,
		},
		BPF: BPF{
			Syscall: ok, BTF: ok, TCX: ok, Unprivileged: "2", Lockdown: "none", MemlockKiB: ^uint64(0),
			Load:     Answer{State: OK, Detail: "11 programs pass the verifier"},
			Programs: []Probe{{"program sockops", ok}, {"tc bpf_sk_assign", ok}, {"map SkStorage", ok}},
		},
		IPv6: IPv6{Kernel: true, On: true},
		Lab:  Lab{Ran: ok, Clsact: ok, Rootless: ok},
		Network: Network{
			AppPorts: config.PortRange{First: 32768, Last: 60999},
			Rules: []Rule{
				{Family: redirect.IPv4, Table: 255},
				{Family: redirect.IPv4, Priority: 32766, Table: 254},
				{Family: redirect.IPv6, Table: 255},
			},
		},
		Namespaces: UserNamespaces{Max: "63000"},
	}
	for _, r := range rights {
		f.Capabilities = append(f.Capabilities, r.name)
	}
	for _, s := range ebpf.Plan(config.Capture{}, redirect.Host{IPv6: true}, redirect.Persistent).Sysctls {
		f.Sysctls = append(f.Sysctls, Sysctl{Name: s.Name, Want: s.Value, Value: "0", Why: s.Why, Writable: ok})
	}
	for _, family := range []int{4, 6} {
		for _, flavour := range []string{"nft", "legacy"} {
			f.Lab.Tables = append(f.Lab.Tables, tables(family, flavour))
		}
	}
	return f
}

func tables(family int, flavour string) Tables {
	t := Tables{Program: map[int]string{4: "iptables-", 6: "ip6tables-"}[family] + flavour, Family: family, Flavour: flavour, Version: "1.8.9", Restore: true}
	t.Tried = map[string]Answer{}
	for _, x := range extensions {
		t.Tried[x.name] = Answer{State: OK}
	}
	return t
}

func holding(names ...string) func(*Facts) {
	return func(f *Facts) { f.Capabilities = names }
}

var hosts = map[string]func(*Facts){
	"root": func(*Facts) {},
	"two-capabilities": func(f *Facts) {
		f.Capabilities = []string{"CAP_BPF", "CAP_NET_ADMIN"}
		f.Lab = Lab{Ran: Answer{State: Unknown, Detail: "no network namespace could be made (needs CAP_SYS_ADMIN, or user namespaces): operation not permitted"}}
		f.Namespaces.Unprivileged = f.Lab.Ran
		f.Chains.Unknown = "needs root, for those of iptables-legacy"
	},
	// A pod of GKE Autopilot: no CAP_BPF, a seccomp filter, read-only cgroups and sysctls, a private cgroup namespace.
	"gke-pod": func(f *Facts) {
		holding("CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_SETUID")(f)
		f.Seccomp = true
		f.Cgroup = Cgroup{
			V2: []Mount{{Point: "/sys/fs/cgroup", Root: "/", ReadOnly: true}}, Own: "/", Target: "/sys/fs/cgroup",
			PrivateNS: Answer{State: Missing, Detail: "private: cgroups above this container cannot be named"},
			Writable:  Answer{State: Missing, Detail: "no: it is mounted read-only"},
		}
		f.BPF.Syscall = Answer{State: Unknown, Detail: "needs CAP_BPF"}
		f.BPF.Load = f.BPF.Syscall
		for i := range f.BPF.Programs {
			f.BPF.Programs[i].Answer = f.BPF.Syscall
		}
		readOnly(f)
		f.Lab = Lab{Ran: Answer{State: Unknown, Detail: "no network namespace could be made"}}
		f.Namespaces.Unprivileged = f.Lab.Ran
	},
	"kernel-5.4": func(f *Facts) {
		f.Kernel = "5.4.0-150-generic"
		none := Answer{State: Missing, Detail: "the kernel does not have it"}
		f.BPF.Load = Answer{State: Missing, Detail: "the verifier refuses it: load program: invalid argument"}
		f.BPF.Programs = []Probe{{"program sockops", Answer{State: OK}}, {"tc bpf_sk_assign", none}, {"cgroupsock bpf_sk_storage_get", none}}
		f.BPF.BTF, f.BPF.TCX = none, none
		f.BPF.MemlockKiB = 64
		f.Capabilities = slices.DeleteFunc(f.Capabilities, func(c string) bool { return c == "CAP_SYS_RESOURCE" })
	},
	"cgroup-v1": func(f *Facts) {
		f.Cgroup = Cgroup{V1: 11, PrivateNS: f.Cgroup.PrivateNS, TargetErr: "this kernel has no cgroup2 hierarchy", TargetHint: "only version 1 cgroups are mounted; boot with systemd.unified_cgroup_hierarchy=1, or mount cgroup2"}
	},
	"hybrid-cgroups": func(f *Facts) {
		f.Cgroup.V1, f.Cgroup.V2 = 9, []Mount{{Point: "/sys/fs/cgroup/unified", Root: "/"}}
		f.Cgroup.Given, f.Cgroup.Target = false, "/sys/fs/cgroup/unified/user.slice"
	},
	"no-iptables":  func(f *Facts) { f.Lab.Tables = nil },
	"no-ip6tables": func(f *Facts) { f.Lab.Tables = f.Lab.Tables[:2] },
	"ipv6-off": func(f *Facts) {
		f.IPv6 = IPv6{Kernel: true, Off: []string{"all", "eth0", "lo"}}
		f.Lab.Tables = f.Lab.Tables[:2]
	},
	"no-tproxy-module": func(f *Facts) {
		for _, t := range f.Lab.Tables {
			t.Tried["TPROXY"] = Answer{State: Missing, Detail: "iptables: No chain/target/match by that name."}
		}
	},
	"read-only-sysctls": readOnly,
	"seccomp": func(f *Facts) {
		f.Seccomp = true
		f.BPF.Syscall = Answer{State: Missing, Detail: "EPERM in spite of the capability: a seccomp filter or a security module forbids it"}
		f.BPF.Load = Answer{State: Unknown, Detail: "operation not permitted"}
	},
	"neighbours": func(f *Facts) {
		f.Chains.Found = []Chain{{"nft", "ip", "nat", "ISTIO_OUTPUT"}, {"nft", "inet", "istio-proxy-nat", "prerouting"}, {"legacy", "ip", "nat", "PROXY_INIT_REDIRECT"}}
		f.Lab.Tables[0].Rules, f.Lab.Tables[1].Rules = 12, 3
		f.Network.Listening = []Listener{{15006, "envoy"}, {15001, "envoy"}, {16001, "pillion"}, {4143, ""}, {20000, "consul"}}
		f.Captures = []Installed{{Slot: 0, Backend: "ebpf", Cgroup: "/sys/fs/cgroup/system.slice/shop.service", Effective: true}, {Slot: 7, Backend: "ebpf"}}
		f.Network.Routes = []int{166, 167}
	},
	"exclusive-program": func(f *Facts) {
		f.Cgroup.Held = []HeldHook{{Cgroup: "/sys/fs/cgroup", Attach: "connect4", Exclusive: true}}
	},
	"override-program": func(f *Facts) {
		f.Cgroup.Held = []HeldHook{{Cgroup: "/sys/fs/cgroup/system.slice", Attach: "connect6"}}
	},
	// Cilium reads other bits of the mark, and asks table local late.
	"cilium": func(f *Facts) {
		f.Network.Rules = []Rule{
			{Family: redirect.IPv4, Priority: 9, Mark: 0x200, Mask: 0xf00, Table: 2004},
			{Family: redirect.IPv4, Priority: 100, Table: 255},
			{Family: redirect.IPv4, Priority: 32766, Table: 254},
		}
	},
	"foreign-rules": func(f *Facts) {
		f.Network.Rules = append(f.Network.Rules,
			Rule{Family: redirect.IPv4, Priority: 10, Mark: 1 << 30, Mask: 1 << 30, Table: 7},
			Rule{Family: redirect.IPv4, Priority: 64, Selective: true, Table: 8},
			Rule{Family: redirect.IPv4, Priority: 71, Selective: true, Table: 8})
		f.Network.Listening = []Listener{{16001, "nginx"}}
		f.Network.AppPorts = config.PortRange{First: 1024, Last: 60999}
	},
	"vpn-first": func(f *Facts) {
		f.Network.Rules = append(f.Network.Rules, Rule{Family: redirect.IPv4, Priority: 50, Table: 51820})
	},
	"user-namespace": func(f *Facts) { f.InnerUser = true },
	"no-user-namespaces": func(f *Facts) {
		f.Capabilities = nil
		f.Namespaces = UserNamespaces{Max: "63000", AppArmor: "1", Unprivileged: Answer{State: Unknown, Detail: "permission denied"}}
	},
}

func readOnly(f *Facts) {
	for i := range f.Sysctls {
		f.Sysctls[i].Writable = Answer{State: Missing, Detail: "/proc/sys is mounted read-only"}
	}
}

// TestHosts compares the judgement over each host with testdata/*.json.
func TestHosts(t *testing.T) {
	for _, name := range slices.Sorted(maps.Keys(hosts)) {
		t.Run(name, func(t *testing.T) {
			f := root()
			hosts[name](&f)
			got, err := json.MarshalIndent(sparse(Judge(f, config.DefaultShared())), "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			golden.Assert(t, string(got)+"\n", name+".json")
		})
	}
}

// sparse leaves out the rows that are ok and no news: those of the host `root`, word for word.
func sparse(r Report) Report {
	known := Judge(root(), config.DefaultShared()).Rows
	if diff := cmp.Diff(known, r.Rows); diff == "" {
		return r
	}
	r.Rows = slices.DeleteFunc(r.Rows, func(row Row) bool {
		return slices.ContainsFunc(known, func(k Row) bool { return cmp.Equal(k, row) })
	})
	return r
}

func TestVerdictsInShort(t *testing.T) {
	for name, want := range map[string][3]Usable{ // ebpf, tproxy, redirect
		"root":              {Full, Full, Full},
		"two-capabilities":  {Limited, Unclear, Unclear},
		"gke-pod":           {No, Unclear, Unclear},
		"kernel-5.4":        {No, Full, Full},
		"cgroup-v1":         {No, Full, Full},
		"hybrid-cgroups":    {Full, Full, Full},
		"no-iptables":       {Full, No, No},
		"no-ip6tables":      {Full, No, No},
		"ipv6-off":          {Full, Full, Full},
		"no-tproxy-module":  {Full, No, Full},
		"read-only-sysctls": {Limited, Limited, Full},
		"seccomp":           {No, Full, Full},
		"neighbours":        {Limited, Limited, Limited},
		"exclusive-program": {No, Full, Full},
		"override-program":  {Limited, Full, Full},
		"cilium":            {Limited, Limited, Full},
		"foreign-rules":     {No, No, No},
		"vpn-first":         {No, No, Full},
		"user-namespace":    {No, No, No},
	} {
		f := root()
		hosts[name](&f)
		r := Judge(f, config.DefaultShared())
		for i, b := range []Backend{EBPF, TProxy, Redirect} {
			if r.Verdicts[i].Backend != b || r.Verdicts[i].Usable != want[i] {
				t.Errorf("%s, %s: %+v, want %s", name, b, r.Verdicts[i], want[i])
			}
		}
	}
}

func TestARestrictionLeavesOutOtherRows(t *testing.T) {
	r := Judge(root(), config.DefaultShared(), Redirect)
	if len(r.Verdicts) != 1 || r.Verdicts[0].Backend != Redirect {
		t.Errorf("verdicts: %+v", r.Verdicts)
	}
	for _, row := range r.Rows {
		if len(row.Needs) > 0 && row.Needs[Redirect] == "" {
			t.Errorf("row %q is there, which redirect does not need", row.What)
		}
	}
}

func TestAnotherSlotIsProposedThatIsFree(t *testing.T) {
	rules := []Rule{{Priority: 9, Mask: config.Slot(0).Mask()}, {Priority: config.Slot(1).RulePriority()}}
	if got := freeSlot(rules); got != "2" {
		t.Errorf("slot %s", got)
	}
	if got := freeSlot([]Rule{{Mask: ^uint32(0)}}); got != "?" {
		t.Errorf("slot %s", got)
	}
}

// TestHooksAreThoseOfThePlan keeps the hooks that are looked at the same as those that are attached.
func TestHooksAreThoseOfThePlan(t *testing.T) {
	var want, got []string
	for _, h := range ebpf.Plan(config.Capture{}, redirect.Host{}, redirect.Persistent).Hooks {
		want = append(want, h.Attach)
	}
	for _, h := range hookTypes {
		got = append(got, h.name)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestCgroupMounts(t *testing.T) {
	const text = `30 23 0:26 / /sys/fs/cgroup rw,relatime shared:4 - tmpfs tmpfs rw
31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw,nsdelegate
32 30 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
33 30 0:27 /../.. /host/cgroup ro,nosuid - cgroup2 cgroup rw
`
	v2, v1 := cgroupMounts(text)
	want := []Mount{{Point: "/sys/fs/cgroup/unified", Root: "/"}, {Point: "/host/cgroup", Root: "/../..", ReadOnly: true}}
	if diff := cmp.Diff(want, v2); diff != "" || v1 != 1 {
		t.Errorf("version 1: %d; version 2 (-want +got):\n%s", v1, diff)
	}
}

func TestListening(t *testing.T) {
	const text = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:3E81 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 100 0 0 10 0
   1: 0100007F:3E82 0100007F:3E81 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0 100 0 0 10 0
`
	if diff := cmp.Diff(map[uint16]string{16001: "4711"}, maps.Collect(listening(text))); diff != "" {
		t.Error(diff)
	}
}

func TestReleasesCompare(t *testing.T) {
	for release, want := range map[string]bool{"5.4.0-150-generic": true, "5.9": true, "5.10.0": false, "6.1": false, "4.19": true, "nonsense": false} {
		if got := before(release, 5, 10); got != want {
			t.Errorf("%s before 5.10: %t", release, got)
		}
	}
}
