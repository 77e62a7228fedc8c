// SPDX-License-Identifier: Apache-2.0

// Package redirect says what is captured and how: a policy and the facts of a host become a Plan, and a backend below
// this package (redirect/ebpf) installs, verifies, reports and removes it.
//
// What always holds: a Plan is pure data, made without looking at or touching the host, and the same for the same input;
// everything that a backend does to a host stands in the Plan; and whoever changes the capture of a network namespace
// holds its Lock.
package redirect

import (
	"fmt"
	"io"
	"strings"

	"github.com/pillionproxy/pillion/config"
)

// Host is what a Plan depends on beside the policy.
type Host struct {
	Interfaces   []Interface
	IPv6         bool   // the kernel speaks IPv6 at all
	FixedSysctls bool   // the kernel parameters of the network namespace may not be written (a pod's /proc/sys)
	CgroupID     uint64 // of the captured cgroup: its inode number
	// ExcludedCgroups are the ids of the cgroups that the policy excludes.
	ExcludedCgroups []uint64
}

// Interface is one network interface.
type Interface struct {
	Index    int
	Name     string
	Loopback bool
	Up       bool
	Ethernet bool // packets start with an Ethernet header
	IPv6     bool // not switched off by disable_ipv6
}

// Lifetime says who keeps a capture.
type Lifetime string

// The lifetimes.
const (
	Persistent Lifetime = "persistent" // stays when the installer exits; ends with the cgroup and the namespace, or by Remove
	Held       Lifetime = "held"       // ends with the installing process, even by SIGKILL
)

// Family is an IP version.
type Family int

// The families.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// Plan is everything that a backend changes on the host, in the order of installation: the capture begins with the last
// hook. Removal takes the hooks away first.
type Plan struct {
	Backend  string         `json:"backend"`
	Lifetime Lifetime       `json:"lifetime"`
	Policy   config.Capture `json:"policy"`
	CgroupID uint64         `json:"cgroup_id"`
	// ExcludedCgroups are the ids of the cgroups that the policy excludes.
	ExcludedCgroups []uint64 `json:"excluded_cgroups,omitempty"`
	Filters         []Filter `json:"filters"`
	Sysctls         []Sysctl `json:"sysctls"`
	Routes          []Route  `json:"routes"`
	Rules           []Rule   `json:"rules"`
	Hooks           []Hook   `json:"hooks"`
	Tables          []Table  `json:"tables,omitempty"`
}

// Filter is a tc program on one side of an interface.
type Filter struct {
	Link    string `json:"link"`
	Index   int    `json:"index"`
	Egress  bool   `json:"egress"`
	Program string `json:"program"`
	Why     string `json:"why"`
}

// Direction is "ingress" or "egress".
func (f Filter) Direction() string {
	if f.Egress {
		return "egress"
	}
	return "ingress"
}

// Sysctl is a kernel parameter of the network namespace that must have a value.
type Sysctl struct {
	Name  string `json:"name"` // with dots
	Value string `json:"value"`
	Why   string `json:"why"`
}

// Path is its file.
func (s Sysctl) Path() string { return "/proc/sys/" + strings.ReplaceAll(s.Name, ".", "/") }

// Route is a default route in a table of ours: local through a link, or unreachable where Link is empty.
type Route struct {
	Family Family `json:"family"`
	Table  int    `json:"table"`
	Link   string `json:"link,omitempty"`
	Index  int    `json:"index,omitempty"`
	Metric int    `json:"metric"`
	Why    string `json:"why"`
}

// Rule sends packets to a table, or refuses them as unreachable where Table is 0: those with a mark, or, where there are
// Ports, TCP packets that this host sends to one of them.
type Rule struct {
	Family   Family           `json:"family"`
	Priority int              `json:"priority"`
	Mark     uint32           `json:"mark,omitempty"`
	Mask     uint32           `json:"mask,omitempty"`
	Ports    config.PortRange `json:"ports,omitzero"`
	Table    int              `json:"table,omitempty"`
	Why      string           `json:"why"`
}

// Hook is a program on the captured cgroup.
type Hook struct {
	Attach  string `json:"attach"` // as the kernel's tools name it
	Program string `json:"program"`
	Why     string `json:"why"`
}

// Table is what is added to one table of a packet filter.
type Table struct {
	Family Family       `json:"family"`
	Tool   string       `json:"tool"` // as it is called: iptables-nft, ip6tables-legacy
	Name   string       `json:"table"`
	Chains []string     `json:"chains"` // ours, wholly
	Rules  []PacketRule `json:"rules"`  // of these chains
	Jumps  []PacketRule `json:"jumps"`  // in chains of the kernel, before everything that is there
}

// PacketRule is a rule of a packet filter, in the words of iptables(8).
type PacketRule struct {
	Chain   string `json:"chain"`
	Match   string `json:"match,omitempty"`
	Target  string `json:"target"`            // with its -j or -g
	Counter string `json:"counter,omitempty"` // verdict that its packets count as
	Why     string `json:"why"`
}

// WriteText prints the plan as the commands that would do the same, each with its reason.
func (p Plan) WriteText(w io.Writer) error {
	var b strings.Builder
	step := func(why, format string, args ...any) {
		fmt.Fprintf(&b, "  %-74s # %s\n", fmt.Sprintf(format, args...), why)
	}
	scope := "cgroup " + p.Policy.Cgroup
	if p.Policy.Cgroup == "" {
		scope = "the whole network namespace"
	}
	fmt.Fprintf(&b, "backend %s, %s, slot %s, %s\n", p.Backend, p.Lifetime, p.Policy.Slot, scope)
	fmt.Fprintf(&b, "no proxy: outbound %s, inbound %s\n", p.Policy.OnProxyDown, p.Policy.OnProxyDownInbound)
	for _, f := range p.Policy.Selection.Flags() {
		fmt.Fprintf(&b, "%s\n", f)
	}
	if len(p.Filters) > 0 {
		b.WriteString("filters\n")
	}
	for _, f := range p.Filters {
		step(f.Why, "tc filter replace dev %s %s pref %d bpf da %s", f.Link, f.Direction(), p.Policy.Slot.FilterPriority(), f.Program)
	}
	if len(p.Sysctls) > 0 {
		b.WriteString("sysctls\n")
	}
	for _, s := range p.Sysctls {
		step(s.Why, "sysctl -w %s=%s", s.Name, s.Value)
	}
	if len(p.Routes) > 0 {
		b.WriteString("routes\n")
	}
	for _, r := range p.Routes {
		what := "unreachable default"
		if r.Link != "" {
			what = "local default dev " + r.Link
		}
		step(r.Why, "ip -%d route replace %s table %d metric %d", r.Family, what, r.Table, r.Metric)
	}
	if len(p.Rules) > 0 {
		b.WriteString("rules\n")
	}
	for _, r := range p.Rules {
		action := "unreachable"
		if r.Table != 0 {
			action = fmt.Sprintf("lookup %d", r.Table)
		}
		what := fmt.Sprintf("fwmark %#x/%#x", r.Mark, r.Mask)
		if r.Mask == 0 {
			what = fmt.Sprintf("iif lo ipproto tcp dport %s", r.Ports)
		}
		step(r.Why, "ip -%d rule add pref %d %s %s", r.Family, r.Priority, what, action)
	}
	if len(p.Hooks) > 0 {
		b.WriteString("hooks\n")
	}
	for _, h := range p.Hooks {
		step(h.Why, "bpftool cgroup attach %s %s %s multi", p.Policy.Cgroup, h.Attach, h.Program)
	}
	for _, t := range p.Tables {
		fmt.Fprintf(&b, "%s -t %s\n", t.Tool, t.Name)
		for _, r := range t.Rules {
			step(r.Why, "-A %s", strings.Join(strings.Fields(r.Chain+" "+r.Match+" "+r.Target), " "))
		}
		for i, r := range t.Jumps {
			step(r.Why, "-I %s", strings.Join(strings.Fields(fmt.Sprintf("%s %d %s %s", r.Chain, position(t.Jumps, i), r.Match, r.Target)), " "))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// position is the place of a jump in its chain, from 1 on.
func position(jumps []PacketRule, i int) int {
	n := 1
	for _, j := range jumps[:i] {
		if j.Chain == jumps[i].Chain {
			n++
		}
	}
	return n
}
