// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"time"

	"github.com/pillionproxy/pillion/config"
	bootstrap "github.com/pillionproxy/pillion/init"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/ebpf"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func newInitCommand(e *env) *cobra.Command {
	policy := config.DefaultCapture()
	output := newOutputFlag("text")
	var dryRun, noVerify, ignoreOpen bool
	var timeout, confirm time.Duration
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Install the capture for a cgroup, and exit",
		Long: `Install the capture: from now on every TCP connection of the cgroup's processes, and every one to their listeners,
passes through "pillion proxy" in this network namespace. Then exit; the capture stays, without a pinned object or a
process, until "pillion clean", or until the cgroup and the namespace are gone.

It needs CAP_BPF and CAP_NET_ADMIN. Without --cgroup, the cgroup of the pod is found from inside one of its containers,
which may need CAP_DAC_READ_SEARCH or the host's cgroup file system. Before it ends it proves by real connections that
traffic is taken; a capture that fails the proof is taken back. Run twice, it changes nothing the second time.`,
		Example: `  pillion init                                            # in a pod's init container
  pillion init --cgroup /sys/fs/cgroup/system.slice/shop.service
  pillion init --cgroup /sys/fs/cgroup/shop --dry-run      # what it would do, as commands`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := invalid(policy.Validate()); err != nil {
				return err
			}
			if confirm < 0 {
				return invalid(fmt.Errorf("--confirm %s: must not be negative", confirm))
			}
			if dryRun {
				return printPlan(e.stdout, policy, output)
			}
			if err := bootstrap.RequireCapabilities(); err != nil {
				return err
			}
			ctx, stop := interruptible(cmd.Context(), timeout)
			defer stop()
			r, err := bootstrap.Init(ctx, bootstrap.Options{
				Options: ebpf.Options{Without: without(e), IgnoreOpenListeners: ignoreOpen},
				Policy:  policy, Verify: !noVerify, Confirm: confirm, Log: newLogger(e.stderr, "auto", 0),
			})
			if err != nil {
				return err
			}
			if output.json() {
				return writeJSON(e.stdout, r)
			}
			return printInit(e.stdout, r)
		},
	}
	f := cmd.Flags()
	captureFlags(f, &policy)
	f.BoolVar(&dryRun, "dry-run", false, "print what would be done, and do nothing")
	f.BoolVar(&noVerify, "no-verify", false, "do not prove the capture by connections")
	f.BoolVar(&ignoreOpen, "ignore-open-listeners", false, "leave listeners uncaptured that are open already and cannot be taken over")
	f.DurationVar(&confirm, "confirm", 0, "take the capture back after this time, unless \"pillion confirm\" is called before")
	f.DurationVar(&timeout, "timeout", time.Minute, "how long all of it may take")
	f.VarP(output, "output", "o", "what to print")
	return cmd
}

// captureFlags binds the policy of a persistent capture.
func captureFlags(f *pflag.FlagSet, p *config.Capture) {
	f.StringVar(&p.Cgroup, "cgroup", "", "cgroup2 directory to capture (default: the pod of this container)")
	policyFlags(f, p)
	f.Uint32Var(&p.ProxyUID, "proxy-uid", p.ProxyUID, "user of the proxy inside the cgroup; its sockets are left alone")
	f.Var((*slotFlag)(&p.Slot), "slot", "which of the captures that may live side by side in a network namespace")
	sharedFlags(f, &p.Shared)
	selectionFlags(f, &p.Selection)
}

func policyFlags(f *pflag.FlagSet, p *config.Capture) {
	f.Var(&p.OnProxyDown, "on-proxy-down", "outbound connections while no proxy listens: wait for it, pass uncaptured, or fail at once")
	f.Var(&p.OnProxyDownInbound, "on-proxy-down-inbound", "the same for inbound connections")
}

func printPlan(w io.Writer, policy config.Capture, output *outputFlag) error {
	plan, foundBy, err := bootstrap.MakePlan(policy)
	if err != nil {
		return err
	}
	if output.json() {
		return writeJSON(w, plan)
	}
	fmt.Fprintf(w, "# cgroup found by: %s\n", foundBy)
	return plan.WriteText(w)
}

func printInit(w io.Writer, r bootstrap.Result) error {
	what := "captured"
	switch {
	case len(r.Changed) == 0:
		what = "captured already"
	case r.Replaced:
		what = "captured anew"
	}
	p := r.Plan.Policy
	fmt.Fprintf(w, "%s %s (found by %s) in %s\n", what, r.Cgroup, r.FoundBy, r.Took.Round(time.Millisecond))
	fmt.Fprintf(w, "backend %s, slot %s; while no proxy listens: outbound %s, inbound %s\n", r.Plan.Backend, p.Slot, p.OnProxyDown, p.OnProxyDownInbound)
	if err := printChecks(w, r.Checks); err != nil {
		return err
	}
	if !r.ConfirmBefore.IsZero() {
		fmt.Fprintf(w, "it is taken back at %s unless you run `pillion confirm`\n", r.ConfirmBefore.Format(time.TimeOnly))
	}
	return nil
}

func printChecks(w io.Writer, checks []redirect.Check) error {
	t := newTable(w)
	for _, c := range checks {
		verdict := "proven"
		switch {
		case !c.OK:
			verdict = "FAILED"
		case !c.Proven:
			verdict = "-"
		}
		family := fmt.Sprintf("IPv%d", c.Family)
		if c.Mapped {
			family = "mapped"
		}
		t.row(family, c.Direction, c.Interface, verdict, c.Detail, c.Rule)
	}
	return t.flush()
}
