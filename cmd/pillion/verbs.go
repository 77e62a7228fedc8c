// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version is set by the linker; a build without it names the revision that Go recorded.
var version = ""

func verbs(e *env) []*cobra.Command {
	return []*cobra.Command{
		newRunCommand(e),
		newInitCommand(e),
		newProxyCommand(e),
		newStatusCommand(e),
		newVerifyCommand(e),
		newExplainCommand(e),
		newCheckCommand(e),
		newConfirmCommand(e),
		newCleanCommand(e),
		newInjectCommand(e),
		newUninjectCommand(e),
		newVersionCommand(e),
		newProbeCommand(e),
		newGuardCommand(e),
		newKeepCommand(e),
	}
}

func newVersionCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprintln(e.stdout, "pillion", versionString())
			return err
		},
	}
}

func versionString() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				return "devel " + s.Value
			}
		}
	}
	return "devel"
}

// outputFlag is -o: for people or for programs.
type outputFlag struct {
	value   string
	allowed [2]string
}

func (o *outputFlag) String() string { return o.value }

func (o *outputFlag) Set(s string) error {
	if s != o.allowed[0] && s != o.allowed[1] {
		return fmt.Errorf("%q is neither %s nor %s", s, o.allowed[0], o.allowed[1])
	}
	o.value = s
	return nil
}

func (o *outputFlag) Type() string { return o.allowed[0] + "|" + o.allowed[1] }

func (o *outputFlag) json() bool { return o.value == "json" }

func newOutputFlag(people string) *outputFlag {
	return &outputFlag{people, [2]string{people, "json"}}
}

func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}
