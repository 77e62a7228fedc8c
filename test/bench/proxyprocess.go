// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/pillionproxy/pillion/config"
)

// process is a proxy that runs.
type process struct {
	host  *proxied
	cmd   *exec.Cmd
	began int64 // by CLOCK_MONOTONIC, when it was executed
	ended chan struct{}

	stopping atomic.Bool
}

var errStopped = errors.New("the proxy was stopped")

// start starts the proxy of a host; nil where it has none. The context that it returns ends with the proxy. stop ends it.
func (p *proxied) start(ctx context.Context) (_ *process, _ context.Context, err error) {
	if p.program == nil {
		return nil, ctx, nil
	}
	log, err := os.Create(p.log)
	if err != nil {
		return nil, ctx, err
	}
	defer log.Close()
	said, say, err := os.Pipe()
	if err != nil {
		return nil, ctx, err
	}
	defer said.Close()
	running, ends := context.WithCancelCause(ctx)
	r := &process{host: p, ended: make(chan struct{})}
	r.cmd = p.sidecarCommand(ctx, append([]string{p.lab.self, "launch"}, p.program...)...)
	r.cmd.Stdout, r.cmd.Stderr, r.cmd.ExtraFiles = log, log, []*os.File{say}
	err = r.cmd.Start()
	_ = say.Close()
	if err != nil {
		ends(err)
		return nil, ctx, err
	}
	go func() {
		_ = r.cmd.Wait() // its error is what the state says
		if r.stopping.Load() {
			ends(errStopped)
		} else {
			ends(fmt.Errorf("%s ended by itself: %s", p.program[0], r.cmd.ProcessState))
		}
		close(r.ended)
	}()
	text, err := io.ReadAll(said)
	if err == nil {
		r.began, err = strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	}
	if err != nil {
		return nil, ctx, errors.Join(fmt.Errorf("launch: %w", err), r.stop())
	}
	return r, running, nil
}

// stop ends the proxy and what it has started.
func (r *process) stop() error {
	if r == nil {
		return nil
	}
	r.stopping.Store(true)
	err := emptyCgroup(filepath.Join(r.host.cgroup, "sidecar"))
	if err == nil {
		<-r.ended
	}
	return err
}

// listening waits until the proxy listens, without a connection that it would have to answer.
func (r *process) listening(ctx context.Context) error {
	if r == nil {
		return nil
	}
	port := fmt.Sprintf(":%04X", config.PortOutbound)
	return eventually(func() (bool, error) {
		for _, family := range []string{"tcp", "tcp6"} {
			// Column 1 is the local address, 3 the state; 0A is LISTEN (Documentation/networking/proc_net_tcp.rst).
			text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", r.cmd.Process.Pid, family))
			if err != nil {
				return false, errors.Join(context.Cause(ctx), err)
			}
			for line := range strings.Lines(string(text)) {
				if f := strings.Fields(line); len(f) > 3 && strings.HasSuffix(f[1], port) && f[3] == "0A" {
					return true, nil
				}
			}
		}
		return false, context.Cause(ctx)
	})
}

// loading is a client that runs.
type loading struct {
	cmd     *exec.Cmd
	stderr  strings.Builder
	in      io.WriteCloser
	samples *json.Decoder
}

// load starts a client in the app's cgroup.
func (p *proxied) load(ctx context.Context, args ...string) (*loading, error) {
	args = append([]string{
		p.lab.self, "load-client", "-target", p.target(), "-sources", p.sources().String(),
		"-carried=" + strconv.FormatBool(p.program != nil),
	}, args...)
	c := &loading{cmd: p.command(ctx, "app", args...)}
	c.cmd.Stderr = &c.stderr
	var err error
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	c.samples = json.NewDecoder(out)
	return c, c.cmd.Start()
}

// proceed lets the client take its next step.
func (c *loading) proceed() error {
	_, err := io.WriteString(c.in, "\n")
	return err
}

// sample waits for the end of a step.
func (c *loading) sample() (s loadSample, err error) {
	if err := c.samples.Decode(&s); err != nil {
		return s, errors.Join(errors.New("the client ended"), c.end())
	}
	return s, nil
}

// end has the client close its connections and end. It may be called again.
func (c *loading) end() error {
	if c.cmd.ProcessState != nil {
		return nil
	}
	_ = c.in.Close() // it may have ended
	if err := c.cmd.Wait(); err != nil {
		return fmt.Errorf("client: %w\n%s", err, strings.TrimSpace(c.stderr.String()))
	}
	return nil
}

// openFiles is how many descriptors a process may have here.
func openFiles() (uint64, error) {
	var limit syscall.Rlimit
	err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit)
	return limit.Max, err
}

// raiseOpenFiles gives that many to this process and to those that it starts.
func raiseOpenFiles() error {
	limit, err := openFiles()
	if err != nil {
		return err
	}
	return syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: limit, Max: limit})
}
