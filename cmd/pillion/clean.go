// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"time"

	bootstrap "github.com/pillionproxy/pillion/init"
	"github.com/spf13/cobra"
)

func newCleanCommand(e *env) *cobra.Command {
	var cgroup string
	cmd := &cobra.Command{
		Use:   "clean",
		Short: "Take the capture of a cgroup away",
		Long: `Take away what "pillion init" installed for the cgroup in this network namespace, and give back what was there before:
rules, routes, filters, qdiscs and kernel parameters. New connections pass directly from then on.

It needs CAP_NET_ADMIN, CAP_BPF, and CAP_SYS_ADMIN to detach programs that another process attached; without the last one
clean refuses and changes nothing: they end with their cgroup.`,
		Example: `  pillion clean --cgroup /sys/fs/cgroup/system.slice/shop.service`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := interruptible(cmd.Context(), time.Minute)
			defer stop()
			if err := bootstrap.Clean(ctx, cgroup); err != nil {
				return err
			}
			_, err := fmt.Fprintln(e.stdout, "removed; everything is as it was")
			return err
		},
	}
	cmd.Flags().StringVar(&cgroup, "cgroup", "", "cgroup2 directory whose capture to remove (default: the pod of this container)")
	return cmd
}
