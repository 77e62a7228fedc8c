// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// prepare makes the host of a subject and starts what the subject has.
func (b captureBench) prepare(ctx context.Context, l *lab, subject string) error {
	h, err := l.join(ctx, subject)
	if err != nil {
		return err
	}
	switch subject {
	case "redirect+relay":
		if err := h.redirect(ctx); err != nil {
			return err
		}
		return h.startSidecar(ctx, true, l.self, "relay")
	case "capture+relay":
		if err := h.startSidecar(ctx, true, l.self, "relay", "-transparent"); err != nil {
			return err
		}
		return h.capture(ctx)
	case "pillion":
		if err := h.startSidecar(ctx, false, l.pillion, "proxy", "--admin", "none", "--log-format", "json"); err != nil {
			return err
		}
		return h.capture(ctx)
	case "rootless":
		return h.startRootless(ctx)
	case "slirp4netns":
		return h.startSlirp(ctx)
	case "slirp4netns-64k":
		return h.startSlirp(ctx, "--mtu=65520")
	}
	return nil
}

// startRootless has a user without rights run a command that does nothing; the clients go into its namespaces.
func (h *host) startRootless(ctx context.Context) (err error) {
	const nobody = "65534"
	h.carried = true
	h.sidecar, err = h.start(h.command(ctx, "", "setpriv", "--reuid", nobody, "--regid", nobody, "--clear-groups", "--inh-caps=-all", "--bounding-set=-all",
		h.lab.pillion, "run", "--backend", "rootless", "--report", "none", "--", "sh", "-c", "echo ready; exec sleep 100000"), true)
	if err != nil {
		return err
	}
	pid := h.sidecar.Process.Pid
	for _, what := range []string{"keeper", "command"} {
		files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
		if err != nil {
			return err
		}
		var children []string
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			children = append(children, strings.Fields(string(text))...)
		}
		if len(children) != 1 {
			return fmt.Errorf("find the %s of `pillion run`: the processes below %d are %q", what, pid, children)
		}
		if pid, err = strconv.Atoi(children[0]); err != nil {
			return err
		}
	}
	h.enter(pid)
	return nil
}

// enter has the clients run in the user and network namespace of a process.
func (h *host) enter(pid int) {
	h.through = []string{"nsenter", "--user", "--net", "--preserve-credentials", "--target", strconv.Itoa(pid)}
}

// startSlirp makes a user and a network namespace, and a stack in user space between it and the host's.
func (h *host) startSlirp(ctx context.Context, flags ...string) error {
	inner, err := h.start(h.command(ctx, "", "unshare", "--user", "--map-root-user", "--net", "sh", "-c", "echo ready; exec sleep 100000"), true)
	if err != nil {
		return err
	}
	ready, readyWriter, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	args := append([]string{"slirp4netns", "--configure", "--enable-ipv6", "--ready-fd=3"}, flags...)
	slirp := h.command(ctx, "", append(args, strconv.Itoa(inner.Process.Pid), "tap0")...)
	slirp.ExtraFiles = []*os.File{readyWriter}
	h.sidecar, err = h.start(slirp, false)
	_ = readyWriter.Close()
	if err != nil {
		return err
	}
	if _, err := ready.Read(make([]byte, 1)); err != nil {
		text, _ := os.ReadFile(h.log)
		return fmt.Errorf("slirp4netns did not become ready: %w\n%s", err, text)
	}
	h.enter(inner.Process.Pid)
	return nil
}
