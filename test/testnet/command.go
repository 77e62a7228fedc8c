// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// User is who a command runs as.
type User struct {
	UID, GID uint32
	// Caps are the only capabilities that the command can ever have: for root they are its bounding set, for another
	// user its ambient set too. Nil leaves root with all, and another user with none.
	Caps []uintptr
	// NoNewPrivs forbids the command to gain privileges by executing files.
	NoNewPrivs bool
}

// Cmd is an exec.Cmd that starts inside a namespace and a cgroup, is waited for from its start on, and is killed when
// the test ends. StdoutPipe and StderrPipe must not be used: what it prints goes to an io.Writer.
type Cmd struct {
	*exec.Cmd
	User *User // nil: as the test itself

	t    testing.TB
	ns   *Namespace // nil: that of the test
	cg   *Cgroup    // nil: that of the test
	done chan struct{}
	err  error // of Wait; valid once done is closed
}

// Command prepares a program that we did not write, inside the namespace and the cgroup (nil: outside all of ours).
func (ns *Namespace) Command(cg *Cgroup, name string, args ...string) *Cmd {
	return &Cmd{Cmd: exec.Command(name, args...), t: ns.t, ns: ns, cg: cg}
}

// Command prepares a program in the namespace and the cgroup of the test itself.
func (n *Net) Command(name string, args ...string) *Cmd {
	return &Cmd{Cmd: exec.Command(name, args...), t: n.t}
}

// Start starts the command. A goroutine waits for it; Done is closed when it has ended.
func (c *Cmd) Start() error {
	if c.WaitDelay == 0 {
		c.WaitDelay = 10 * time.Second // a grandchild that keeps our pipe open must not hold the test
	}
	if c.SysProcAttr == nil {
		c.SysProcAttr = &syscall.SysProcAttr{}
	}
	if c.cg != nil {
		dir, err := os.Open(c.cg.Path)
		if err != nil {
			return err
		}
		defer dir.Close()
		c.SysProcAttr.UseCgroupFD, c.SysProcAttr.CgroupFD = true, int(dir.Fd())
	}
	if c.User != nil {
		c.SysProcAttr.Credential = &syscall.Credential{Uid: c.User.UID, Gid: c.User.GID, Groups: []uint32{}}
		if c.User.UID != 0 {
			c.SysProcAttr.AmbientCaps = c.User.Caps
		}
	}
	var err error
	// A child inherits namespace, bounding set and no_new_privs from the thread that forks it.
	onThread(func() {
		if err = c.enter(); err == nil {
			err = c.Cmd.Start()
		}
	})
	if err != nil {
		return err
	}
	c.done = make(chan struct{})
	go c.reap()
	c.t.Cleanup(c.Kill)
	return nil
}

func (c *Cmd) reap() {
	defer close(c.done)
	c.err = c.Cmd.Wait()
}

// enter gives the calling thread what the command inherits.
func (c *Cmd) enter() error {
	if c.ns != nil {
		if err := unix.Setns(c.ns.fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter namespace %s: %w", c.ns.Name, err)
		}
	}
	if c.User == nil {
		return nil
	}
	if c.User.Caps != nil {
		if err := dropBounding(c.User.Caps); err != nil {
			return err
		}
	}
	if c.User.NoNewPrivs {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("set no_new_privs: %w", err)
		}
	}
	return nil
}

// dropBounding takes everything but the given capabilities out of the bounding set of the calling thread.
func dropBounding(keep []uintptr) error {
	kept := make(map[uintptr]bool)
	for _, c := range keep {
		kept[c] = true
	}
	for c := uintptr(0); c <= 63; c++ {
		if kept[c] {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) { // the kernel has no such capability
			break
		}
		if err != nil {
			return fmt.Errorf("drop capability %d from the bounding set: %w", c, err)
		}
	}
	return nil
}

// Done is closed when the command has ended.
func (c *Cmd) Done() <-chan struct{} { return c.done }

// Running reports whether the command has been started and not ended.
func (c *Cmd) Running() bool {
	if c.done == nil {
		return false
	}
	select {
	case <-c.done:
		return false
	default:
		return true
	}
}

// Wait waits for a command that was started. It may be called several times, and fails the test when the command does
// not end.
func (c *Cmd) Wait() error {
	c.t.Helper()
	select {
	case <-c.done:
		return c.err
	case <-time.After(2 * patience):
		c.t.Errorf("waited in vain: the end of %v", c.Args)
		c.Kill()
		return c.err
	}
}

// Run starts the command and waits for it.
func (c *Cmd) Run() error {
	c.t.Helper()
	if err := c.Start(); err != nil {
		return err
	}
	return c.Wait()
}

// Output runs the command and returns its standard output. An *exec.ExitError carries its standard error.
func (c *Cmd) Output() (string, error) {
	c.t.Helper()
	var out, stderr bytes.Buffer
	c.Stdout = &out
	if c.Stderr == nil {
		c.Stderr = &stderr
	}
	err := c.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		exit.Stderr = stderr.Bytes()
		err = fmt.Errorf("%v: %w\n%s", c.Args, err, stderr.Bytes())
	}
	return out.String(), err
}

// CombinedOutput runs the command and returns everything that it printed.
func (c *Cmd) CombinedOutput() (string, error) {
	c.t.Helper()
	out := &lockedBuffer{}
	c.Stdout, c.Stderr = out, out
	err := c.Run()
	return out.String(), err
}

// Kill kills the command with SIGKILL, if it runs, and waits for its end.
func (c *Cmd) Kill() {
	if c.Running() {
		_ = c.Process.Kill()
	}
	if c.done != nil {
		<-c.done
	}
}

// Signal sends a signal to the command.
func (c *Cmd) Signal(sig os.Signal) {
	c.t.Helper()
	if err := c.Process.Signal(sig); err != nil {
		c.t.Fatalf("testnet: signal %v to %v: %v", sig, c.Args, err)
	}
}

// ExitCode is the exit code of a command that has ended, as a shell would say it: 128+n after signal n.
func (c *Cmd) ExitCode() int {
	if ws, ok := c.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return c.ProcessState.ExitCode()
}

// lockedBuffer is a bytes.Buffer for several writers.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
