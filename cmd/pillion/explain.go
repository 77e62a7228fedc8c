// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/pillionproxy/pillion/config"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// explanation is the verdict of one capture.
type explanation struct {
	Slot    config.Slot `json:"slot"`
	Backend string      `json:"backend,omitempty"` // none: of the flags
	Flow    config.Flow `json:"flow"`
	config.Verdict
	NoProxy config.FailureMode `json:"on_proxy_down"` // what becomes of a captured one while no proxy listens
}

func newExplainCommand(e *env) *cobra.Command {
	output := newOutputFlag("text")
	policy := config.DefaultCapture()
	var flow config.Flow
	var link string
	cmd := &cobra.Command{
		Use:   "explain ADDRESS:PORT",
		Short: "Say what becomes of a connection, and which rule decides",
		Long: `Say whether a connection of the app to ADDRESS:PORT is captured by the capture of this network namespace, and by which
of its rules. With --inbound it is a connection from ADDRESS to the app's PORT.

Nothing is sent. The rules are those of the installed capture, which takes CAP_SYS_ADMIN to read; or, where flags of
"pillion init" are given, theirs, whatever is installed.`,
		Example: `  pillion explain 10.0.0.5:5432
  pillion explain --uid 1000 '[fd00::5]:443'
  pillion explain --inbound 192.0.2.7:8080 --interface eth0
  pillion explain 10.0.0.5:5432 --exclude-outbound-ports 5432     # before it is installed`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if flow.Address, err = netip.ParseAddrPort(args[0]); err != nil {
				return &config.Fault{
					Err:  fmt.Errorf("%q is not an address and a port: %w", args[0], err),
					Hint: "write 10.0.0.5:443 or [fd00::5]:443; a name is not looked up",
					Exit: config.ExitUsage,
				}
			}
			if err := invalid(policy.Validate()); err != nil {
				return err
			}
			flow.Interface = config.InterfaceName(link)
			list, err := explain(cmd, policy, flow)
			if err != nil {
				return err
			}
			if output.json() {
				return writeJSON(e.stdout, list)
			}
			for _, x := range list {
				if _, err := fmt.Fprintln(e.stdout, x); err != nil {
					return err
				}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.BoolVar(&flow.Inbound, "inbound", false, "a connection from the address to the app's port")
	f.Uint32Var(&flow.UID, "uid", 0, "user who makes an outbound connection")
	f.Uint32Var(&flow.GID, "gid", 0, "group who makes an outbound connection")
	f.StringVar(&link, "interface", "", "interface by which it leaves or comes in")
	f.StringVar(&flow.Cgroup, "in-cgroup", "", "cgroup2 directory of the app's process, if one is excluded")
	captureFlags(f, &policy)
	f.VarP(output, "output", "o", "what to print")
	return cmd
}

// explain asks the flags if one that says what is captured was given, else what is installed.
func explain(cmd *cobra.Command, policy config.Capture, flow config.Flow) ([]explanation, error) {
	own, err := ownAddresses()
	if err != nil {
		return nil, err
	}
	if policyGiven(cmd.Flags()) {
		return []explanation{newExplanation("", policy, flow, own)}, nil
	}
	reports, err := inspect(cmd.Context(), policy.Cgroup)
	if err != nil {
		return nil, err
	}
	var list []explanation
	for _, r := range reports {
		if r.Policy != nil {
			list = append(list, newExplanation(r.Backend, *r.Policy, flow, own))
		}
	}
	if len(list) == 0 {
		return nil, &config.Fault{
			Err:  errors.New("the policy of what is installed here cannot be read"),
			Hint: "it takes CAP_SYS_ADMIN (root outside of a container has it); or give the flags with which `pillion init` was run",
			Exit: config.ExitNoPerm,
		}
	}
	return list, nil
}

// policyGiven reports whether a flag was given that is part of a policy.
func policyGiven(f *pflag.FlagSet) bool {
	var policy config.Capture
	known := pflag.NewFlagSet("", pflag.ContinueOnError)
	captureFlags(known, &policy)
	given := false
	f.Visit(func(f *pflag.Flag) {
		given = given || f.Name != "cgroup" && known.Lookup(f.Name) != nil
	})
	return given
}

func newExplanation(backend string, policy config.Capture, flow config.Flow, own func(netip.Addr) bool) explanation {
	x := explanation{Slot: policy.Slot, Backend: backend, Flow: flow, Verdict: policy.Judge(flow, own), NoProxy: policy.OnProxyDown}
	if flow.Inbound {
		x.NoProxy = policy.OnProxyDownInbound
	}
	return x
}

func (x explanation) String() string {
	by := "these flags"
	if x.Backend != "" {
		by = fmt.Sprintf("slot %s, backend %s", x.Slot, x.Backend)
	}
	if !x.Captured {
		return fmt.Sprintf("left alone: %s (%s)", x.Rule, by)
	}
	return fmt.Sprintf("captured: %s (%s; while no proxy listens: %s)", x.Rule, by, x.NoProxy)
}

// ownAddresses tells the addresses of this network namespace.
func ownAddresses() (func(netip.Addr) bool, error) {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list own addresses: %w", err)
	}
	var own []netip.Addr
	for _, a := range list {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			own = append(own, p.Addr())
		}
	}
	return func(a netip.Addr) bool { return slices.Contains(own, a) }, nil
}
