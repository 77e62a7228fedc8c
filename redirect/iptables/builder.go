// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
)

// Our chains. All begin with chainPrefix, and nobody else's do.
const (
	chainPrefix = "PILLION_"
	chainOut    = chainPrefix + "OUT"
	chainOld    = chainPrefix + "OLD"
	chainLo     = chainPrefix + "LO"
	chainIn     = chainPrefix + "IN"
	chainNew    = chainPrefix + "NEW"
	chainWait   = chainPrefix + "WAIT" // there only while other rules are on their way
	chainReset  = chainPrefix + "RESET"
	chainHold   = chainPrefix + "HOLD"
	chainHoldIn = chainPrefix + "HOLD_IN"
	chainPolicy = chainPrefix + "POLICY" // never jumped to: its comments are the policy
)

// builder writes the rules of one table.
type builder struct {
	table redirect.Table
	v6    bool
	begun string // the chain that was begun last
	now   string // the one that rules go to: it, or one that continues it
	parts int
}

func newBuilder(tool Tool, table string) *builder {
	return &builder{table: redirect.Table{Family: tool.Family, Tool: tool.Name, Name: table}, v6: tool.Family == redirect.IPv6}
}

// chain begins a chain.
func (b *builder) chain(name string) {
	b.begun, b.now, b.parts = name, name, 1
	b.table.Chains = append(b.table.Chains, name)
}

// continued begins a chain that goes on where the present one has let something in.
func (b *builder) continued() string {
	b.parts++
	name := fmt.Sprintf("%s_%d", b.begun, b.parts)
	b.table.Chains = append(b.table.Chains, name)
	return name
}

func (b *builder) rule(match, target, why string) { b.counted(match, target, "", why) }

func (b *builder) counted(match, target, counter, why string) {
	b.table.Rules = append(b.table.Rules, redirect.PacketRule{Chain: b.now, Match: match, Target: target, Counter: counter, Why: why})
}

func (b *builder) jump(from, match, chain, why string) {
	b.table.Jumps = append(b.table.Jumps, redirect.PacketRule{Chain: from, Match: match, Target: "-j " + chain, Why: why})
}

// selectOutbound lets through what a Selection selects of outbound connections; the rest returns.
func (b *builder) selectOutbound(s config.Selection) {
	dimension(b, "outbound-ports", s.OutboundPorts, b.ports)
	dimension(b, "outbound-cidrs", s.OutboundCIDRs, b.cidrs("-d"))
	dimension(b, "outbound-interfaces", s.OutboundInterfaces, interfaces("-o"))
	dimension(b, "uids", s.UIDs, ids("--uid-owner"))
	dimension(b, "gids", s.GIDs, ids("--gid-owner"))
}

// selectInbound is the same for inbound connections.
func (b *builder) selectInbound(s config.Selection) {
	dimension(b, "inbound-ports", s.InboundPorts, b.ports)
	dimension(b, "inbound-cidrs", s.InboundCIDRs, b.cidrs("-s"))
	dimension(b, "inbound-interfaces", s.InboundInterfaces, interfaces("-i"))
}

// dimension writes one dimension of a Selection: what it excludes returns; where it includes, only that goes on, in a
// chain of its own.
func dimension[T any](b *builder, flag string, s config.Selector[T], matches func([]T) []string) {
	for _, m := range matches(s.Exclude) {
		b.rule(m, "-j RETURN", "--exclude-"+flag)
	}
	if len(s.Include) == 0 {
		return
	}
	next := b.continued()
	for _, m := range matches(s.Include) {
		b.rule(m, "-g "+next, "--include-"+flag)
	}
	b.rule("", "-j RETURN", "no entry of --include-"+flag)
	b.now = next
}

// multiportSlots is how many ports a rule may name; a range counts twice (iptables-extensions(8), multiport).
const multiportSlots = 15

func (b *builder) ports(list []config.PortRange) (matches []string) {
	var entries []string
	slots := 0
	flush := func() {
		if len(entries) > 0 {
			matches = append(matches, "-p tcp -m multiport --dports "+strings.Join(entries, ","))
		}
		entries, slots = nil, 0
	}
	for _, r := range config.Merged(list) {
		need := 1
		if r.First != r.Last {
			need = 2
		}
		if slots+need > multiportSlots {
			flush()
		}
		entries, slots = append(entries, colon(r)), slots+need
	}
	flush()
	return matches
}

// colon writes a range as packet filters do.
func colon(r config.PortRange) string {
	if r.First == r.Last {
		return r.String()
	}
	return fmt.Sprintf("%d:%d", r.First, r.Last)
}

func (b *builder) cidrs(option string) func([]netip.Prefix) []string {
	return func(list []netip.Prefix) (matches []string) {
		for _, p := range list {
			if p.Addr().Is6() == b.v6 {
				matches = append(matches, option+" "+p.String())
			}
		}
		return matches
	}
}

func interfaces(option string) func([]config.InterfaceName) []string {
	return func(list []config.InterfaceName) (matches []string) {
		for _, n := range list {
			name := string(n)
			if begin, ok := strings.CutSuffix(name, "*"); ok {
				name = begin + "+"
			}
			matches = append(matches, option+" "+name)
		}
		return matches
	}
}

func ids(option string) func([]config.IDRange) []string {
	return func(list []config.IDRange) (matches []string) {
		for _, r := range list {
			matches = append(matches, fmt.Sprintf("-m owner %s %s", option, r))
		}
		return matches
	}
}

// proxyPorts are those on which the proxy itself may be asked from outside, or listens.
func proxyPorts(policy config.Capture) string {
	l := policy.Listeners
	return fmt.Sprintf("%d,%d,%d,%d,%d", l.Outbound, l.Inbound, l.InboundOwn, config.PortAdmin, config.PortHealth)
}

// proxys matches what the proxy sends. Its dials are from ports of its own; from another, a connection of its user is an
// app's that happens to have the same.
func proxys(policy config.Capture) string {
	match := fmt.Sprintf("-p tcp -m owner --uid-owner %d", policy.ProxyUID)
	if !policy.TrustProxyUser {
		match += fmt.Sprintf(" -m multiport --sports %s,%s", colon(policy.DialOutbound), colon(policy.DialInbound))
	}
	return match
}
