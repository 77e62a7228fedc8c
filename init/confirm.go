// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/iptables"
	"golang.org/x/sys/unix"
)

// A capture that cuts its own installer off from the host could not be taken back by hand. With a deadline, a process in a
// session of its own takes it back by itself unless `pillion confirm` comes before. It listens at an abstract Unix address
// of the network namespace, so that one installation at a time can wait there.

// GuardVerb is the hidden verb of the program under which it runs RunGuard.
const GuardVerb = "__guard"

const confirmName = "@pillion/confirm"

// guard is what the guarding process is told on its standard input. Its listener is descriptor 3.
type guard struct {
	After    time.Duration    `json:"after"`
	Backend  Backend          `json:"backend"`
	Flavour  iptables.Flavour `json:"flavour,omitempty"`
	Cgroup   string           `json:"cgroup"`
	Previous *config.Capture  `json:"previous,omitempty"` // to give back; nil: nothing was captured before
}

// errPending says that an installation waits to be confirmed.
func errPending() error {
	return &config.Fault{
		Err:  errors.New("another installation waits to be confirmed in this network namespace"),
		Hint: "`pillion confirm` keeps it; else it is taken back when its time is over",
	}
}

// reserveConfirm takes the address at which Confirm is heard.
func reserveConfirm() (*net.UnixListener, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: confirmName, Net: "unix"})
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, errPending()
	}
	if err != nil {
		return nil, fmt.Errorf("wait for a confirmation: %w", err)
	}
	return l, nil
}

// startGuard starts the guarding process, which outlives this one and its terminal.
func startGuard(l *net.UnixListener, g guard) error {
	input, err := json.Marshal(g)
	if err != nil {
		return err
	}
	file, err := l.File()
	if err != nil {
		return fmt.Errorf("start the guard: %w", err)
	}
	defer file.Close()
	in, out, err := os.Pipe() // not a copying goroutine, which would end with us
	if err != nil {
		return fmt.Errorf("start the guard: %w", err)
	}
	defer out.Close()
	defer in.Close()
	cmd := exec.Command("/proc/self/exe", GuardVerb)
	cmd.Stdin, cmd.ExtraFiles = in, []*os.File{file}
	cmd.Dir, cmd.SysProcAttr = "/", &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the guard: %w", err)
	}
	if _, err := out.Write(input); err != nil {
		return fmt.Errorf("start the guard: %w", err)
	}
	return cmd.Process.Release()
}

// RunGuard is the guarding process: it reads a guard from in and waits at the listener.
func RunGuard(ctx context.Context, in io.Reader, listener *os.File) error {
	var g guard
	if err := json.NewDecoder(in).Decode(&g); err != nil {
		return fmt.Errorf("read what to guard: %w", err)
	}
	fl, err := net.FileListener(listener)
	if err != nil {
		return fmt.Errorf("wait for a confirmation: %w", err)
	}
	l := fl.(*net.UnixListener)
	defer l.Close()
	if err := l.SetDeadline(time.Now().Add(g.After)); err != nil {
		return fmt.Errorf("wait for a confirmation: %w", err)
	}
	c, err := l.AcceptUnix()
	if err == nil {
		defer c.Close()
		_, _ = c.Write([]byte{1}) // whoever confirms may have gone: it is confirmed
		return nil
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("wait for a confirmation: %w", err)
	}
	release, err := redirect.Lock(ctx)
	if err != nil {
		return err
	}
	defer release()
	return g.takeBack(ctx)
}

// remember notes what is captured now, and reports whether anything is.
func (g *guard) remember(ctx context.Context, b capturer, policy config.Capture) (found bool, err error) {
	g.Previous, found, err = b.previous(ctx, policy)
	return found, err
}

// takeBack gives back what was captured before, which may be nothing. The caller holds the redirect.Lock.
func (g guard) takeBack(ctx context.Context) error {
	b := capturerOf(g.Backend)
	if g.Previous == nil {
		return b.remove(ctx, g.Cgroup)
	}
	_, err := b.install(ctx, Options{Backend: g.Backend, Flavour: g.Flavour, Policy: *g.Previous})
	return err
}

// Confirm keeps the installation that waits for it.
func Confirm() error {
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: confirmName, Net: "unix"})
	if err != nil {
		return &config.Fault{
			Err:  errors.New("no installation waits to be confirmed in this network namespace"),
			Hint: "if its time was over, it has been taken back: `pillion status` tells",
		}
	}
	defer c.Close()
	if _, err := c.Read(make([]byte, 1)); err != nil {
		return errors.New("the time was over in this moment: the installation is being taken back")
	}
	return nil
}
