// SPDX-License-Identifier: Apache-2.0

package main

import (
	bootstrap "github.com/pillionproxy/pillion/init"
	"github.com/spf13/cobra"
)

// newProbeCommand is the process that init and verify start inside the captured cgroup.
func newProbeCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:    bootstrap.ProbeVerb,
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return bootstrap.RunProbe(cmd.Context(), e.stdin, e.stdout)
		},
	}
}
