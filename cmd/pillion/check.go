// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect/check"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func newCheckCommand(e *env) *cobra.Command {
	output := newOutputFlag("table")
	policy := config.DefaultCapture()
	var only backendsFlag
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Show what this host offers, before anything is installed",
		Long: `Look at everything that a capture depends on, and say for each backend whether it can be used here and why not: kernel,
cgroups, BPF, capabilities, kernel parameters, packet filters, routing rules, and who else redirects in this network
namespace. What the kernel can do is tried, not guessed from its version: rules and qdiscs in a network namespace that is
made for it and gone afterwards.

It changes nothing on the host (the kernel may load modules that it is asked about) and works without root; what it may
not ask is then unknown. Run it where init would run: in the pod, with its capabilities. The exit status is 0 if at least
one backend can be used, else 69.`,
		Example: `  pillion check
  sudo pillion check --cgroup /sys/fs/cgroup/system.slice/shop.service
  pillion check --backend ebpf -o json | jq '.rows[] | select(.state != "ok")'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := invalid(policy.Validate()); err != nil {
				return err
			}
			ctx, stop := interruptible(cmd.Context(), time.Minute)
			defer stop()
			facts := check.Gather(ctx, check.Options{Cgroup: policy.Cgroup, Run: runReader, Lab: runLab})
			r := check.Judge(facts, policy.Shared, only...)
			var err error
			if output.json() {
				err = writeJSON(e.stdout, r)
			} else {
				err = printReport(e.stdout, r)
			}
			if err != nil {
				return err
			}
			if !r.Usable() {
				return &config.Fault{Err: errors.New("no backend can be used here"), Hint: "each row that is not ok says what to do", Exit: config.ExitUnavailable}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&policy.Cgroup, "cgroup", "", "cgroup2 directory that would be captured (default: the pod of this container)")
	f.Var(&only, "backend", "look only at these")
	f.Var((*slotFlag)(&policy.Slot), "slot", "slot that would be used")
	sharedFlags(f, &policy.Shared)
	f.VarP(output, "output", "o", "what to print")
	cmd.AddCommand(newLabCommand(e))
	return cmd
}

// labVerb is the process that check starts inside new namespaces.
const labVerb = "__lab"

func newLabCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:    labVerb,
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return json.NewEncoder(e.stdout).Encode(check.RunLab(cmd.Context(), runReader))
		},
	}
}

// runLab starts this program again in a network namespace of its own; where we may not make one, inside a user namespace
// in which we may.
func runLab(ctx context.Context) (lab check.Lab, err error) {
	alone := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	asUser := &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
		Pdeathsig:   unix.SIGKILL,
	}
	for _, attr := range []*syscall.SysProcAttr{alone, asUser} {
		var out bytes.Buffer
		cmd := exec.CommandContext(ctx, "/proc/self/exe", "check", labVerb)
		cmd.Stdout, cmd.SysProcAttr = &out, attr
		if err = cmd.Run(); err == nil {
			return lab, json.Unmarshal(out.Bytes(), &lab)
		}
	}
	return lab, fmt.Errorf("no network namespace could be made (needs CAP_SYS_ADMIN, or user namespaces): %w", err)
}

// runReader is a check.Runner: the programs that check starts read, or write in the lab's own namespace.
func runReader(ctx context.Context, env []string, program string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func printReport(w io.Writer, r check.Report) error {
	t := newTable(w)
	group := ""
	for _, row := range r.Rows {
		if row.Group != group {
			group = row.Group
			t.row(strings.ToUpper(group))
		}
		t.row("  "+row.What, string(row.State), neededBy(row.Needs), row.Detail)
		if row.Hint != "" {
			t.row("", "", "", "hint: "+row.Hint)
		}
	}
	if err := t.flush(); err != nil {
		return err
	}
	fmt.Fprintln(w)
	t = newTable(w)
	for _, v := range r.Verdicts {
		reasons := v.Reasons
		if len(reasons) == 0 {
			reasons = []string{""}
		}
		t.row(string(v.Backend), string(v.Usable), reasons[0])
		for _, more := range reasons[1:] {
			t.row("", "", more)
		}
	}
	return t.flush()
}

// neededBy names the backends; one that can do without stands in brackets.
func neededBy(needs map[check.Backend]check.Need) string {
	var names []string
	for _, b := range check.Backends() {
		switch needs[b] {
		case check.Required:
			names = append(names, string(b))
		case check.Better:
			names = append(names, "("+string(b)+")")
		}
	}
	if len(names) == 0 {
		return "-"
	}
	return strings.Join(names, " ")
}

// backendsFlag is a list of backends.
type backendsFlag []check.Backend

func (b *backendsFlag) String() string {
	names := make([]string, len(*b))
	for i, v := range *b {
		names[i] = string(v)
	}
	return strings.Join(names, ",")
}

func (b *backendsFlag) Set(s string) error {
	for name := range strings.SplitSeq(s, ",") {
		backend := check.Backend(strings.TrimSpace(name))
		if !slices.Contains(check.Backends(), backend) {
			return fmt.Errorf("%q is none of ebpf, tproxy, redirect, rootless", name)
		}
		*b = append(*b, backend)
	}
	return nil
}

func (b *backendsFlag) Type() string { return "name,..." }
