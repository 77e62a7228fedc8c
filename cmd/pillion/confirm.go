// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"

	bootstrap "github.com/pillionproxy/pillion/init"
	"github.com/spf13/cobra"
)

func newConfirmCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "confirm",
		Short: "Keep what `pillion init --confirm` installed",
		Long: `Keep the capture that "pillion init --confirm" installed in this network namespace. Without it that capture is taken
back when its time is over, and what was captured before is captured again.`,
		Example: `  pillion init --cgroup /sys/fs/cgroup/system.slice/shop.service --confirm 60s
  pillion confirm                              # you can still reach the host: keep it`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if err := bootstrap.Confirm(); err != nil {
				return err
			}
			_, err := fmt.Fprintln(e.stdout, "confirmed; the capture stays")
			return err
		},
	}
}

// newGuardCommand is the process that init --confirm leaves behind until then.
func newGuardCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:    bootstrap.GuardVerb,
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return bootstrap.RunGuard(cmd.Context(), e.stdin, os.NewFile(3, "confirm"))
		},
	}
}
