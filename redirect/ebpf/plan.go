// SPDX-License-Identifier: Apache-2.0

// Package ebpf is the backend that captures by BPF: cgroup hooks mark the app's sockets, rules and routes bring marked
// packets to lo, and tc filters give them to the proxy's listeners.
//
// What always holds: capture begins with the last hook (the one that marks) and ends with its removal, so that a half
// installed or half removed state captures nothing; nothing is pinned; and what was on the host before is either in
// memory (Held) or in the names of our own tc filters (Persistent), where Remove finds it.
package ebpf

import (
	"github.com/pillionproxy/pillion/bpf"
	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
)

// Name of the backend.
const Name = "ebpf"

// hooks in the order of attaching. The last one marks connections: until it is there, the others change nothing.
var hooks = []redirect.Hook{
	{Attach: "sock_create", Program: bpf.CaptureProgPlnSockCreate, Why: "whose socket is it: the app's or the proxy's"},
	{Attach: "post_bind4", Program: bpf.CaptureProgPlnPostBind4, Why: "the same, for listeners that the kernel makes (MPTCP)"},
	{Attach: "post_bind6", Program: bpf.CaptureProgPlnPostBind6, Why: "the same, IPv6"},
	{Attach: "connect4", Program: bpf.CaptureProgPlnConnect4, Why: "clear a stale mark, look for the proxy"},
	{Attach: "connect6", Program: bpf.CaptureProgPlnConnect6, Why: "the same, IPv6 and IPv4-mapped"},
	{Attach: "sock_ops", Program: bpf.CaptureProgPlnSockops, Why: "mark the connection, after its source is chosen"},
}

var sysctls = []redirect.Sysctl{
	{Name: "net.ipv4.tcp_fwmark_accept", Value: "1", Why: "accepted sockets take the mark of their SYN (both families)"},
	{Name: "net.ipv4.fwmark_reflect", Value: "1", Why: "resets take the mark of what they answer"},
	{Name: "net.ipv6.fwmark_reflect", Value: "1", Why: "the same, IPv6"},
	{Name: "net.ipv4.tcp_rfc1337", Value: "0", Why: "TIME_WAIT heeds resets, else a source port used again hangs for a minute"},
}

// Plan says what this backend does for a policy on a host.
func Plan(policy config.Capture, host redirect.Host, lifetime redirect.Lifetime) redirect.Plan {
	p := redirect.Plan{Backend: Name, Lifetime: lifetime, Policy: policy, CgroupID: host.CgroupID, ExcludedCgroups: host.ExcludedCgroups, Hooks: hooks}
	for _, i := range host.Interfaces {
		p.Filters = append(p.Filters, filters(i, policy.Selection)...)
	}
	for _, s := range sysctls {
		if !host.FixedSysctls && (host.IPv6 || s.Name != "net.ipv6.fwmark_reflect") {
			p.Sysctls = append(p.Sysctls, s)
		}
	}
	families := []redirect.Family{redirect.IPv4}
	if host.IPv6 {
		families = append(families, redirect.IPv6)
	}
	for _, f := range families {
		p.Routes = append(p.Routes, redirect.MarkRoutes(policy.Slot, f, host.Interfaces)...)
	}
	for _, f := range families {
		p.Rules = append(p.Rules, redirect.MarkRules(policy.Slot, f)...)
		if host.FixedSysctls {
			p.Rules = append(p.Rules, portRule(policy.Shared, f))
		}
	}
	return p
}

// portRule takes the place of the sysctls where they may not be written: the app's answers to the proxy's dials are known
// by their port in place of their mark. It takes those to other peers with such a port too, and an app's own mark is lost
// to the proxy: good enough for a pod, whose peers seldom have ports below the ephemeral ones.
func portRule(s config.Shared, family redirect.Family) redirect.Rule {
	return redirect.Rule{
		Family: family, Priority: s.Slot.RulePriority() + portRuleOffset, Ports: s.DialInbound, Table: s.Slot.TableCapture(),
		Why: "answers to the proxy's dials, by their port: sysctls may not be written here",
	}
}

// portRuleOffset is the place of the port rule in the slot's block, behind those of MarkRules.
const portRuleOffset = 7

func filters(i redirect.Interface, s config.Selection) []redirect.Filter {
	if i.Loopback {
		return []redirect.Filter{{Link: i.Name, Index: i.Index, Program: bpf.CaptureProgPlnLo, Why: "the app's packets to the proxy, and back"}}
	}
	in := redirect.Filter{Link: i.Name, Index: i.Index, Program: bpf.CaptureProgPlnIn, Why: "connections for the app's listeners to the proxy"}
	if !i.Ethernet {
		in.Program = bpf.CaptureProgPlnInL3
	}
	if !s.InboundInterfaces.LetsIn(func(n config.InterfaceName) bool { return n.Matches(i.Name) }) {
		in.Program, in.Why = bpf.CaptureProgPlnPass, "connections that come in here are left alone"
	}
	return []redirect.Filter{in, {Link: i.Name, Index: i.Index, Egress: true, Program: bpf.CaptureProgPlnOut, Why: "what is marked never leaves"}}
}
