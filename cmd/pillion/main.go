// SPDX-License-Identifier: Apache-2.0

// Command pillion is the sidecar: `run` captures one command, `init` installs the capture and exits, `proxy` carries the
// traffic, `status` and `verify` tell the truth about it, `clean` takes it away.
//
// What always holds: a verb is one file here and decides nothing; it turns flags into a configuration, calls the
// package that does the work, and prints what comes back.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/deploy/inject"
)

// env is the outside world as a command sees it. Tests build another.
type env struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	getenv         func(string) string
}

func main() {
	e := &env{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, getenv: os.Getenv}
	os.Exit(e.main(context.Background(), os.Args[1:]))
}

// exitStatus ends the program with the status of a command that ran, without a message.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

// main runs one command line and returns the exit status.
func (e *env) main(ctx context.Context, args []string) int {
	root := newRootCommand(e)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	var status exitStatus
	if errors.As(err, &status) {
		return int(status)
	}
	if err != nil {
		e.explain(err)
	}
	return config.ExitOf(err)
}

// explain prints an error and what to do about it. In a pod all of it is the last line, which says on which node, too: people
// see it without the rest.
func (e *env) explain(err error) {
	hint := config.HintOf(err)
	if node := e.getenv(inject.NodeVariable); node != "" {
		fmt.Fprintf(e.stderr, "pillion: on node %s: %v", node, err)
		if hint != "" {
			fmt.Fprintf(e.stderr, ": %s", hint)
		}
		fmt.Fprintln(e.stderr)
		return
	}
	fmt.Fprintf(e.stderr, "pillion: %v\n", err)
	if hint != "" {
		fmt.Fprintf(e.stderr, "  hint: %s\n", hint)
	}
}
