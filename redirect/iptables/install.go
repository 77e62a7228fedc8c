// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
)

// Installation is an installed capture that may still be taken back: it ends with Commit or Rollback.
type Installation struct {
	Changed  []string // what was not there before; empty: the very capture was there, whole
	Replaced bool     // an earlier capture was replaced

	journal redirect.Journal
	after   func() error // what Commit still has to remove
}

// Install installs a plan. Installing what is there already changes nothing; another policy, backend or flavour of ours is
// replaced without a moment uncaptured; a failure leaves the host as it was. The caller holds the redirect.Lock.
func Install(ctx context.Context, plan redirect.Plan, tools Tools) (*Installation, error) {
	there, err := objects() // before the state: what somebody makes in between is no reason to keep it
	if err != nil {
		return nil, err
	}
	found, err := readState(ctx)
	if err != nil {
		return nil, err
	}
	before, had := noteOf(found)
	n := note{Backend: plan.Backend, Slot: plan.Policy.Slot, Tracked: tools.Tracked, Sysctls: foundSysctls(plan)}
	if n.Plan, err = planHash(plan); err != nil {
		return nil, err
	}
	if had && before.Slot != n.Slot {
		return nil, &config.Fault{
			Err:  fmt.Errorf("this network namespace is captured already, in slot %d", before.Slot),
			Hint: "take it away first (`pillion clean`), or give --slot " + before.Slot.String(),
		}
	}
	if had {
		n.Sysctls = merged(before.Sysctls, n.Sysctls)
	}
	want, err := states(plan, tools, n)
	if err != nil {
		return nil, err
	}
	n.Made = before.Made
	for _, name := range willMake(want, there) {
		if !slices.Contains(n.Made, name) {
			n.Made = append(n.Made, name)
		}
	}
	if len(n.Made) > 0 {
		if want, err = states(plan, tools, n); err != nil { // the note is in them
			return nil, err
		}
	}

	in := &Installation{Replaced: had && before.Plan != n.Plan}
	err = in.install(ctx, plan, found, want, n)
	if err == nil && had && before.Backend == TProxy && n.Backend != TProxy {
		in.after = func() error { return leaveTProxy(before) }
	}
	in.Changed = in.journal.Changed
	if err != nil {
		return nil, errors.Join(err, in.Rollback())
	}
	return in, nil
}

// states are the tables of a plan as they are to be.
func states(plan redirect.Plan, tools Tools, n note) ([]state, error) {
	var want []state
	policy, err := policyRules(n, plan.Policy)
	if err != nil {
		return nil, err
	}
	for i, t := range plan.Tables {
		var more []redirect.PacketRule
		if i == 0 {
			more = policy
		}
		want = append(want, wanted(t, tools.Of[t.Family], more))
	}
	return want, nil
}

// merged are the values from before any capture: those of an earlier note, and those that nobody has changed yet.
func merged(noted, now []string) []string {
	for i := range now {
		if i < len(noted) && noted[i] != "" {
			now[i] = noted[i]
		}
	}
	return now
}

func (in *Installation) install(ctx context.Context, plan redirect.Plan, found, want []state, n note) error {
	in.journal.OnRollback(func() error {
		if _, had := noteOf(found); had {
			return nil
		}
		return unmake(n.Made)
	})
	if err := in.leaveNote(ctx, found, want); err != nil {
		return err
	}
	restoreSysctls := func() error { return redirect.RestoreSysctls(sysctls, n.Sysctls) }
	if err := in.journal.Sysctls(plan.Sysctls, restoreSysctls); err != nil {
		return sysctlFault(err)
	}
	if err := in.journal.Routes(plan.Routes); err != nil {
		return err
	}
	if err := in.journal.Rules(plan.Rules); err != nil {
		return err
	}
	is := found
	if stateless(want) {
		var err error
		if is, want, err = in.exceptOlder(ctx, plan, found, want, n); err != nil {
			return err
		}
	}
	for _, tool := range toolsOf(is, want) {
		if whole(is, want, tool) {
			continue
		}
		in.journal.OnRollback(func() error { // also if it fails: some of the tables may be done
			now, err := readState(context.WithoutCancel(ctx))
			if err != nil {
				return err
			}
			return apply(context.WithoutCancel(ctx), tool, now, found)
		})
		if err := apply(ctx, tool, is, want); err != nil {
			return err
		}
		if err := in.journal.Did(fmt.Sprintf("rules of %s (IPv%d, %s)", tool.Name, tool.Family, tool.Flavour), nil); err != nil {
			return err
		}
	}
	return nil
}

// leaveNote writes the note and the policy before anything else is changed, so that whatever an installation that is killed
// leaves behind can be found.
func (in *Installation) leaveNote(ctx context.Context, found, want []state) error {
	first := want[0].only(chainPolicy)
	is, has := at(found, first.Tool, first.Table)
	if has && is.only(chainPolicy).sameAs(first) {
		return nil
	}
	next := is.but(chainPolicy)
	next.Chains, next.Rules = append(next.Chains, chainPolicy), append(next.Rules, first.Rules...)
	if err := restore(ctx, first.Tool, transaction(is, next)); err != nil {
		return err
	}
	return in.journal.Did("the note of the capture", func() error {
		ctx := context.WithoutCancel(ctx)
		now, err := readTable(ctx, first.Tool, first.Table)
		if err != nil {
			return err
		}
		return restore(ctx, first.Tool, transaction(now, is))
	})
}

// exceptOlder adds the exceptions of existing.go to the wanted states. Those that are there hold if nothing else changes.
func (in *Installation) exceptOlder(ctx context.Context, plan redirect.Plan, found, want []state, n note) (is, excepted []state, err error) {
	if before, had := noteOf(found); had && before.Plan == n.Plan {
		same := withRules(want, func(s state) []string { is, _ := at(found, s.Tool, s.Table); return is.only(chainOld).Rules })
		if !slices.ContainsFunc(toolsOf(found, same), func(t Tool) bool { return !whole(found, same, t) }) {
			return found, same, nil
		}
	}
	in.journal.OnRollback(func() error {
		ctx := context.WithoutCancel(ctx)
		now, err := readState(ctx)
		for _, tool := range toolsOf(want, nil) {
			err = errors.Join(err, apply(ctx, tool, now, found))
		}
		return err
	})
	if is, err = pause(ctx, plan.Policy, want); err != nil {
		return nil, nil, err
	}
	older := make(map[redirect.Family][]string)
	for _, tool := range toolsOf(want, nil) {
		rules, err := exceptions(plan.Policy, tool.Family)
		if err != nil {
			return nil, nil, err
		}
		for _, r := range rules {
			older[tool.Family] = append(older[tool.Family], line(r))
		}
	}
	return is, withRules(want, func(s state) []string { return older[s.Tool.Family] }), nil
}

// toolsOf are the tools by which something is or will be there, those of the wanted states first: what is replaced by
// another flavour goes when the new one captures.
func toolsOf(found, want []state) (tools []Tool) {
	for _, s := range slices.Concat(want, found) {
		if !slices.ContainsFunc(tools, func(t Tool) bool { return t.Family == s.Tool.Family && t.Flavour == s.Tool.Flavour }) {
			tools = append(tools, s.Tool)
		}
	}
	return tools
}

// whole reports whether everything of a tool is there as it is wanted.
func whole(found, want []state, tool Tool) bool {
	for _, table := range tables {
		is, has := at(found, tool, table)
		will, wants := at(want, tool, table)
		if has != wants || has && !is.sameAs(will) {
			return false
		}
	}
	return true
}

// sysctlFault says what is lost without writable kernel parameters.
func sysctlFault(err error) error {
	return &config.Fault{
		Err:  fmt.Errorf("the backend tproxy must set kernel parameters of the network namespace: %w", err),
		Hint: "in a pod: securityContext.privileged for this init container, or the same parameters under spec.securityContext.sysctls (unsafe sysctls must be allowed by the kubelet); the backend redirect needs none of them",
		Exit: config.ExitUnavailable,
	}
}

// Commit makes the installation final.
func (in *Installation) Commit() error {
	if in.after == nil {
		return nil
	}
	return in.after()
}

// Rollback leaves the host as it was before Install.
func (in *Installation) Rollback() error { return in.journal.Rollback() }
