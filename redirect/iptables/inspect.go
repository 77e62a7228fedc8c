// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/coreos/go-iptables/iptables"
	"github.com/pillionproxy/pillion/redirect"
)

// Inspect reports the capture by packet filters of this network namespace; none where there is none. It changes nothing.
// It takes CAP_NET_ADMIN: without it, nothing is found.
func Inspect(ctx context.Context) ([]redirect.Report, error) {
	found, err := readState(ctx)
	if err != nil || len(found) == 0 {
		return nil, err
	}
	n, hasNote := noteOf(found)
	r := redirect.Report{Backend: n.Backend, Slot: n.Slot}
	policy, err := policyOf(found)
	if err != nil {
		return nil, err
	}
	if !hasNote || policy == nil {
		r.Items = append(r.Items, redirect.Item{
			Kind: "rules", Name: "note", State: redirect.StateMissing,
			Detail: "what is left here does not say what it was: somebody removed a part. `pillion init` installs it anew, `pillion clean` takes it away",
		})
		return []redirect.Report{r}, nil
	}
	r.Policy = policy
	host, err := redirect.ReadHost(0)
	if err != nil {
		return nil, err
	}
	tools := Tools{Of: make(map[redirect.Family]Tool), Tracked: n.Tracked}
	for _, s := range found {
		tools.Of[s.Tool.Family] = s.Tool
	}
	plan, err := Plan(n.Backend, *policy, host, tools)
	if err != nil {
		r.Items = append(r.Items, redirect.Item{Kind: "rules", Name: "plan", State: redirect.StateWrong, Detail: err.Error()})
		return []redirect.Report{r}, nil
	}
	for _, t := range plan.Tables {
		r.Items = append(r.Items, inspectTable(t, tools.Of[t.Family], found)...)
	}
	routing, err := plan.InspectRouting()
	if err != nil {
		return nil, err
	}
	r.Items = append(r.Items, routing...)
	r.Items = append(r.Items, redirect.InspectProxy(policy.Listeners, policy.OnProxyDown, policy.OnProxyDownInbound)...)
	r.Counters = counters(plan, tools)
	return []redirect.Report{r}, nil
}

// inspectTable compares a table with the plan. Rules that depend on what was under way at the installation do not count.
func inspectTable(t redirect.Table, tool Tool, found []state) []redirect.Item {
	is, _ := at(found, tool, t.Name)
	want := wanted(t, tool, nil)
	is.Rules = without(is.Rules, chainOld, chainPolicy)
	name := fmt.Sprintf("IPv%d %s", t.Family, t.Name)
	rules := redirect.Item{Kind: "rules", Name: name, State: redirect.StateOK, Detail: fmt.Sprintf("%d in %s, by %s", len(want.Rules), strings.Join(want.Chains, ", "), tool.Name)}
	jumps := redirect.Item{Kind: "jumps", Name: name, State: redirect.StateOK, Detail: t.Jumps[0].Why}
	const again = "; run `pillion init` again"
	switch {
	case len(is.Chains) == 0:
		rules.State, rules.Detail = redirect.StateMissing, "the chains are gone"+again
	case !state{Rules: is.Rules, First: true}.sameAs(state{Rules: want.Rules}):
		rules.State, rules.Detail = redirect.StateWrong, fmt.Sprintf("somebody changed them: %d rules, must be %d%s", len(is.Rules), len(want.Rules), again)
	}
	switch {
	case len(is.Jumps) == 0:
		jumps.State, jumps.Detail = redirect.StateMissing, "nothing passes through our chains"+again
	case !is.First:
		jumps.State, jumps.Detail = redirect.StateWrong, "somebody's rules stand before ours, and may decide before them"+again
	case !state{Jumps: is.Jumps, First: true}.sameAs(state{Jumps: want.Jumps}):
		jumps.State, jumps.Detail = redirect.StateWrong, "somebody changed them"+again
	}
	return []redirect.Item{rules, jumps}
}

// without leaves out the rules of the named chains.
func without(rules []string, chains ...string) []string {
	var kept []string
	for _, r := range rules {
		out := false
		for _, c := range chains {
			out = out || chainOf(r) == c
		}
		if !out {
			kept = append(kept, r)
		}
	}
	return kept
}

// counters sums the packets of the rules that count as a verdict.
func counters(plan redirect.Plan, tools Tools) map[string]uint64 {
	counts := make(map[string]uint64)
	for _, t := range plan.Tables {
		tool := tools.Of[t.Family]
		proto := iptables.ProtocolIPv4
		if t.Family == redirect.IPv6 {
			proto = iptables.ProtocolIPv6
		}
		ipt, err := iptables.New(iptables.IPFamily(proto), iptables.Path(tool.Path), iptables.Timeout(5))
		if err != nil {
			return nil
		}
		for _, r := range t.Rules {
			if r.Counter == "" {
				continue
			}
			lines, err := ipt.ListWithCounters(t.Name, r.Chain)
			if err != nil {
				return nil
			}
			for _, l := range lines {
				if commentOf(l) == r.Why {
					counts[r.Counter] += packets(l)
				}
			}
		}
	}
	return counts
}

// packets is the first number behind -c in a rule as iptables -S -v lists it.
func packets(line string) uint64 {
	_, rest, _ := strings.Cut(line, " -c ")
	first, _, _ := strings.Cut(rest, " ")
	n, _ := strconv.ParseUint(first, 10, 64)
	return n
}
