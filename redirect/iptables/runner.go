// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
)

// The programs of iptables are started here and nowhere else.

// lookPath finds a program also where a container's PATH does not look.
func lookPath(name string) (string, error) {
	path, err := exec.LookPath(name)
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if err == nil {
			break
		}
		path, err = exec.LookPath(filepath.Join(dir, name))
	}
	return path, err
}

// run returns what a program prints. Its error has what the program said of it.
func run(ctx context.Context, input string, path string, args ...string) (string, error) {
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &out, &errs
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	// A program that outlives us would change the host under the feet of the next init. The signal is sent when the thread
	// ends that started it (prctl(2), PR_SET_PDEATHSIG).
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return "", fmt.Errorf("%s: %w: %s", filepath.Base(path), err, said(errs.String()))
	}
	return out.String(), nil
}

// said is the part of an error message that says something.
func said(message string) string {
	var lines []string
	for l := range strings.Lines(message) {
		l = strings.TrimSpace(l)
		if l != "" && !strings.HasPrefix(l, "Try `") && !strings.HasPrefix(l, "#") {
			lines = append(lines, l)
		}
	}
	return strings.Join(lines, " ")
}

// lockWait is how long, in seconds, a program waits for the lock of the legacy flavour.
const lockWait = "10"

// restore makes a transaction: all of it, or nothing.
func restore(ctx context.Context, t Tool, transaction string) error {
	_, err := run(ctx, transaction, t.Path+"-restore", "--noflush", "--wait", lockWait)
	if err != nil {
		return filterFault(fmt.Errorf("%w (transaction of %d lines)", err, strings.Count(transaction, "\n")))
	}
	return nil
}

// save lists a table, as iptables-save prints it. A table that is not there is empty, and stays so.
func save(ctx context.Context, t Tool, table string, options ...string) ([]string, error) {
	if t.Flavour == Legacy && !legacyTables(t.Family)[table] {
		return nil, nil
	}
	out, err := run(ctx, "", t.Path+"-save", append(options, "-t", table)...)
	if err != nil {
		return nil, filterFault(err)
	}
	return strings.Split(strings.TrimSpace(out), "\n"), nil
}
