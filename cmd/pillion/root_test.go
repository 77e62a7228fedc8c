// SPDX-License-Identifier: Apache-2.0

package main

import (
	"io"
	"strings"
	"testing"
)

// TestEveryVerbHasHelp: each command that people see says what it does, and how it is used by an example.
func TestEveryVerbHasHelp(t *testing.T) {
	root := newRootCommand(&env{stdin: strings.NewReader(""), stdout: io.Discard, stderr: io.Discard, getenv: func(string) string { return "" }})
	for _, cmd := range root.Commands() {
		if cmd.Hidden || cmd.Name() == "completion" || cmd.Name() == "help" || cmd.Name() == "version" {
			continue
		}
		if cmd.Short == "" || cmd.Long == "" || !strings.Contains(cmd.Example, "pillion "+cmd.Name()) {
			t.Errorf("%s: its help lacks a summary, an explanation or an example", cmd.Name())
		}
	}
}
