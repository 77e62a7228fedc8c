// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/pillionproxy/pillion/config"
	bootstrap "github.com/pillionproxy/pillion/init"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/iptables"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func newInitCommand(e *env) *cobra.Command {
	o := bootstrap.Options{Backend: bootstrap.Auto, Flavour: iptables.Auto, Policy: config.DefaultCapture()}
	output := newOutputFlag("text")
	var dryRun, noVerify bool
	var timeout time.Duration
	var system string
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Install the capture, and exit",
		Long: `Install the capture: from now on every TCP connection of the cgroup's processes, and every one to their listeners,
passes through "pillion proxy" in this network namespace. Then exit; the capture stays, without a pinned object or a
process, until "pillion clean", or until the cgroup and the namespace are gone.

The backend ebpf captures a cgroup. It needs CAP_BPF and CAP_NET_ADMIN; without --cgroup, the cgroup of the pod is found
from inside one of its containers, which may need CAP_DAC_READ_SEARCH or the host's cgroup file system. The backends
tproxy and redirect are for hosts without BPF or cgroup2: they capture the whole network namespace by packet filters
(iptables), and need CAP_NET_ADMIN. "pillion check" tells what this host allows.

Before it ends it proves by real connections that traffic is taken; a capture that fails the proof is taken back. Run
twice, it changes nothing the second time; run with other flags, it replaces the capture without a gap.`,
		Example: `  pillion init                                            # in a pod's init container
  pillion init --cgroup /sys/fs/cgroup/system.slice/shop.service
  pillion init --cgroup /sys/fs/cgroup/shop --dry-run      # what it would do, as commands
  pillion init --backend redirect --on-proxy-down closed --on-proxy-down-inbound closed
  pillion init --exclude-outbound-ports 5432,6379 --confirm 60s`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log := newLogger(e.stderr, "auto", 0)
			if system != "" {
				wish, err := applyCompat(os.Environ(), system, &o.Policy, givenFlags(e, cmd.Flags()), log)
				if err != nil {
					return err
				}
				if wish != "" && !givenFlags(e, cmd.Flags())("backend") {
					log.Info("the other system's mode would be this backend; --backend takes it", "backend", wish)
				}
			}
			if err := invalid(o.Policy.Validate()); err != nil {
				return err
			}
			if o.Confirm < 0 {
				return invalid(fmt.Errorf("--confirm %s: must not be negative", o.Confirm))
			}
			ctx, stop := interruptible(cmd.Context(), timeout)
			defer stop()
			e.forTests(&o)
			if dryRun {
				return printPlan(ctx, e.stdout, o, output)
			}
			o.Verify, o.Log = !noVerify, log
			r, err := bootstrap.Init(ctx, o)
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
	captureFlags(f, &o.Policy)
	f.Var(&o.Backend, "backend", "how to capture; auto takes the first that this host allows, and says why not the others")
	f.Var(&o.Flavour, "iptables", "which packet filter the backends tproxy and redirect use")
	f.StringVar(&system, "compat", "", "read the settings of another mesh from the environment: istio, linkerd, kuma or consul")
	f.BoolVar(&dryRun, "dry-run", false, "print what would be done, and do nothing")
	f.BoolVar(&noVerify, "no-verify", false, "do not prove the capture by connections")
	f.BoolVar(&o.IgnoreOpenListeners, "ignore-open-listeners", false, "leave listeners uncaptured that are open already and cannot be taken over")
	f.DurationVar(&o.Confirm, "confirm", 0, "take the capture back after this time, unless \"pillion confirm\" is called before")
	f.DurationVar(&timeout, "timeout", time.Minute, "how long all of it may take")
	f.VarP(output, "output", "o", "what to print")
	return cmd
}

// captureFlags binds the policy of a persistent capture.
func captureFlags(f *pflag.FlagSet, p *config.Capture) {
	f.StringVar(&p.Cgroup, "cgroup", "", "cgroup2 directory to capture (default: the pod of this container)")
	policyFlags(f, p)
	f.Uint32Var(&p.ProxyUID, "proxy-uid", p.ProxyUID, "user of the proxy inside the cgroup; its connections are left alone")
	f.BoolVar(&p.TrustProxyUser, "trust-proxy-user", false, "leave every connection of that user alone, whatever its port: for a proxy that is not Pillion's")
	f.Var((*slotFlag)(&p.Slot), "slot", "which of the captures that may live side by side in a network namespace")
	sharedFlags(f, &p.Shared)
	selectionFlags(f, &p.Selection)
}

func policyFlags(f *pflag.FlagSet, p *config.Capture) {
	f.Var(&p.OnProxyDown, "on-proxy-down", "outbound connections while no proxy listens: wait for it, pass uncaptured, or fail at once")
	f.Var(&p.OnProxyDownInbound, "on-proxy-down-inbound", "the same for inbound connections")
}

func printPlan(ctx context.Context, w io.Writer, o bootstrap.Options, output *outputFlag) error {
	r, err := bootstrap.MakePlan(ctx, o)
	if err != nil {
		return err
	}
	if output.json() {
		return writeJSON(w, r.Plan)
	}
	printRefused(w, r.Refused)
	if r.FoundBy != "" {
		fmt.Fprintf(w, "# cgroup found by: %s\n", r.FoundBy)
	}
	return r.Plan.WriteText(w)
}

// printRefused says why a backend was not taken.
func printRefused(w io.Writer, refused []bootstrap.Refusal) {
	for _, r := range refused {
		fmt.Fprintf(w, "# not by %s: %s", r.Backend, r.Reason)
		if r.Hint != "" {
			fmt.Fprintf(w, " (%s)", r.Hint)
		}
		fmt.Fprintln(w)
	}
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
	printRefused(w, r.Refused)
	if r.Cgroup != "" {
		fmt.Fprintf(w, "%s %s (found by %s) in %s\n", what, r.Cgroup, r.FoundBy, r.Took.Round(time.Millisecond))
	} else {
		fmt.Fprintf(w, "%s this network namespace in %s\n", what, r.Took.Round(time.Millisecond))
	}
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
