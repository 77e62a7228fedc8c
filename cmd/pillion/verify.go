// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/pillionproxy/pillion/config"
	bootstrap "github.com/pillionproxy/pillion/init"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/spf13/cobra"
)

func newVerifyCommand(e *env) *cobra.Command {
	output := newOutputFlag("table")
	policy := config.DefaultCapture()
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Prove a capture by real connections",
		Long: `Make connections inside the captured cgroup and see where they arrive: outbound, inbound by each interface, and those
of the proxy's own user, for IPv4 and IPv6. All of them stay on this host. The exit status is 0 if the capture is in
place and no proof failed.

What the selection leaves alone is tried too, entry by entry of each kind. The policy is read from the capture, which
takes CAP_SYS_ADMIN; where that is missing, give the flags of "pillion init" again.

It needs the capabilities of init, and CAP_SETUID and CAP_SETGID to try other users.`,
		Example: `  pillion verify
  pillion verify --cgroup /sys/fs/cgroup/system.slice/shop.service -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			reports, err := inspect(cmd.Context(), policy.Cgroup)
			if err != nil {
				return err
			}
			ctx, stop := interruptible(cmd.Context(), time.Minute)
			defer stop()
			var checks []redirect.Check
			for _, t := range subjects(reports, policy, policyGiven(cmd.Flags())) {
				more, verr := bootstrap.Verify(ctx, t.backend, t.policy)
				checks, err = append(checks, more...), errors.Join(err, verr)
			}
			if output.json() {
				if werr := writeJSON(e.stdout, checks); werr != nil {
					return werr
				}
			} else if werr := printChecks(e.stdout, checks); werr != nil {
				return werr
			}
			if err != nil {
				return err
			}
			return effective(reports)
		},
	}
	f := cmd.Flags()
	captureFlags(f, &policy)
	for _, name := range []string{"on-proxy-down", "on-proxy-down-inbound"} {
		if err := f.MarkHidden(name); err != nil {
			panic(fmt.Sprintf("flag %s: %v", name, err)) // a name that captureFlags does not have
		}
	}
	f.VarP(output, "output", "o", "what to print")
	return cmd
}

// subject is a capture that is to be proven.
type subject struct {
	backend bootstrap.Backend
	policy  config.Capture // what it should do: as it has it with it, or as the flags say
}

func subjects(reports []redirect.Report, flags config.Capture, given bool) []subject {
	var list []subject
	for _, r := range reports {
		s := subject{bootstrap.Backend(r.Backend), flags}
		if r.Policy != nil && !given {
			s.policy = *r.Policy
		}
		if s.backend == bootstrap.EBPF && !given {
			if r.Cgroup == "" {
				continue // of a running command: its cgroup must be named
			}
			s.policy.Cgroup = r.Cgroup
		}
		list = append(list, s)
	}
	if len(list) == 0 {
		list = append(list, subject{bootstrap.EBPF, flags})
	}
	return list
}
