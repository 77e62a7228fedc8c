// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"time"

	"github.com/pillionproxy/pillion/config"
	bootstrap "github.com/pillionproxy/pillion/init"
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

It needs the capabilities of init, and CAP_SETUID to try the proxy's user.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := bootstrap.RequireCapabilities(); err != nil {
				return err
			}
			reports, err := inspect(policy.Cgroup)
			if err != nil {
				return err
			}
			ctx, stop := interruptible(cmd.Context(), time.Minute)
			defer stop()
			checks, err := bootstrap.Verify(ctx, policy)
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
