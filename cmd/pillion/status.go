// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/pillionproxy/pillion/config"
	bootstrap "github.com/pillionproxy/pillion/init"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/cgroup"
	"github.com/pillionproxy/pillion/redirect/ebpf"
	"github.com/spf13/cobra"
)

func newStatusCommand(e *env) *cobra.Command {
	output := newOutputFlag("table")
	var path string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what is captured in this network namespace, and whether it is effective",
		Long: `Show every capture of this network namespace, part by part, with the count of each verdict where it may be read
(CAP_SYS_ADMIN). It changes nothing. The exit status is 0 if there is a capture and all of its parts are in place.`,
		Example: `  pillion status
  pillion status --cgroup /sys/fs/cgroup/system.slice/shop.service -o json
  nsenter --net=/run/netns/shop pillion status            # in another network namespace`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			reports, err := inspect(cmd.Context(), path)
			if err != nil {
				return err
			}
			if output.json() {
				err = writeJSON(e.stdout, reports)
			} else {
				err = printReports(e.stdout, reports)
			}
			if err != nil {
				return err
			}
			return effective(reports)
		},
	}
	f := cmd.Flags()
	f.StringVar(&path, "cgroup", "", "only the capture of this cgroup2 directory")
	f.VarP(output, "output", "o", "what to print")
	return cmd
}

// inspect reports the captures of the namespace, or of one cgroup in it. None at all is an error.
func inspect(ctx context.Context, path string) ([]redirect.Report, error) {
	reports, err := bootstrap.Inspect(ctx)
	if err != nil {
		return nil, err
	}
	if path != "" {
		dir, err := cgroup.Open(path)
		if err != nil {
			return nil, err
		}
		defer dir.Close()
		reports = slices.DeleteFunc(reports, func(r redirect.Report) bool { return r.CgroupID != dir.ID })
	}
	if len(reports) == 0 {
		return nil, &config.Fault{
			Err:  ebpf.ErrNotInstalled,
			Hint: "`pillion init` installs the capture of a cgroup; in another network namespace, enter it first (nsenter --net)",
		}
	}
	return reports, nil
}

func effective(reports []redirect.Report) error {
	for _, r := range reports {
		if !r.Effective() {
			return &config.Fault{Err: fmt.Errorf("the capture of slot %s is not effective", r.Slot), Hint: "each part that is not ok says what to do"}
		}
	}
	return nil
}

func printReports(w io.Writer, reports []redirect.Report) error {
	for i, r := range reports {
		if i > 0 {
			fmt.Fprintln(w)
		}
		where := r.Cgroup
		switch {
		case where != "":
		case r.CgroupID == 0 && r.Policy != nil:
			where = "the whole network namespace"
		default:
			where = fmt.Sprintf("cgroup id %d", r.CgroupID)
		}
		state := "effective"
		if !r.Effective() {
			state = "NOT EFFECTIVE"
		}
		fmt.Fprintf(w, "slot %s, backend %s, %s: %s\n", r.Slot, r.Backend, where, state)
		if r.Policy != nil {
			for _, f := range r.Policy.Selection.Flags() {
				fmt.Fprintf(w, "  %s\n", f)
			}
		}
		t := newTable(w)
		for _, item := range r.Items {
			t.row(item.Kind, item.Name, string(item.State), item.Detail)
		}
		if err := t.flush(); err != nil {
			return err
		}
		if err := printCounters(w, r.Counters); err != nil {
			return err
		}
	}
	return nil
}

func printCounters(w io.Writer, counters map[string]uint64) error {
	t := newTable(w)
	for _, name := range slices.Sorted(maps.Keys(counters)) {
		if counters[name] > 0 {
			t.row("verdict", name, fmt.Sprint(counters[name]))
		}
	}
	return t.flush()
}
