// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/pillionproxy/pillion/test/testnet"
	"golang.org/x/sys/unix"
)

// terminal is a pseudo terminal: what a user sees and types is at its master.
type terminal struct {
	master, slave *os.File
	screen        *testnet.Lines
	read          chan struct{}
}

func newTerminal(t *testing.T, rows, columns uint16) *terminal {
	t.Helper()
	// A descriptor of our own making blocks, so that closing it would not end a read; os.OpenFile makes it pollable.
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	fd := int(master.Fd())
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: columns}); err != nil {
		t.Fatal(err)
	}
	tt := &terminal{master: master, slave: slave, screen: &testnet.Lines{}, read: make(chan struct{})}
	go tt.readLoop()
	t.Cleanup(func() {
		slave.Close()
		master.Close()
		<-tt.read
	})
	return tt
}

func (tt *terminal) readLoop() {
	defer close(tt.read)
	b := make([]byte, 4096)
	for {
		n, err := tt.master.Read(b)
		_, _ = tt.screen.Write(b[:n])
		if err != nil {
			return
		}
	}
}

// start starts a command as the leader of a session that has the terminal, as a login shell or sudo does.
func (tt *terminal) start(t *testing.T, cmd *testnet.Cmd) {
	t.Helper()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tt.slave, tt.slave, tt.slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
}

func (tt *terminal) see(t *testing.T, what string) {
	t.Helper()
	tt.screen.Wait(t, what, func(l string) bool { return strings.TrimSuffix(l, "\r") == what })
}

func (tt *terminal) kind(t *testing.T, what string) {
	t.Helper()
	if _, err := tt.master.WriteString(what); err != nil {
		t.Fatal(err)
	}
}

// TestRunKeepsTheTerminal: the command has the very terminal, in the foreground.
func TestRunKeepsTheTerminal(t *testing.T) {
	eachSession(t, func(t *testing.T, s *session) {
		t.Run("size and input", func(t *testing.T) {
			tt := newTerminal(t, 33, 77)
			cmd := s.command(nil, `test -t 0 && test -t 1 && test -t 2 && echo terminal; stty size; read line; echo "line: $line"; exit 4`)
			tt.start(t, cmd)
			tt.see(t, "terminal")
			tt.see(t, "33 77")
			tt.kind(t, "typed\n")
			tt.see(t, "line: typed")
			if err := cmd.Wait(); cmd.ExitCode() != 4 {
				t.Errorf("%v, want exit code 4", err)
			}
		})
		t.Run("Ctrl-C ends the command", func(t *testing.T) {
			tt := newTerminal(t, 24, 80)
			cmd := s.command(nil, `echo ready; while :; do read line; done`)
			tt.start(t, cmd)
			tt.see(t, "ready")
			tt.kind(t, "\x03")
			if err := cmd.Wait(); cmd.ExitCode() != 130 {
				t.Errorf("%v, want exit code 130", err)
			}
		})
		t.Run("Ctrl-C is the command's to handle, once", func(t *testing.T) {
			tt := newTerminal(t, 24, 80)
			cmd := s.command(nil, `n=0; trap 'n=$((n+1)); echo "got $n"' INT; echo ready; while read line; do test "$line" = end && exit 6; done; while read line; do test "$line" = end && exit 6; done`)
			tt.start(t, cmd)
			tt.see(t, "ready")
			tt.kind(t, "\x03")
			tt.screen.Wait(t, "the trap's message", func(l string) bool { return strings.Contains(l, "got 1") }) // after the echo of ^C
			tt.kind(t, "end\n")
			if err := cmd.Wait(); cmd.ExitCode() != 6 || strings.Contains(tt.screen.String(), "got 2") {
				t.Errorf("%v, want exit code 6, and one interrupt:\n%s", err, tt.screen)
			}
		})
		t.Run("Ctrl-Z and fg", func(t *testing.T) {
			tt := newTerminal(t, 24, 80)
			// An interactive shell, in which the user suspends run and takes it up again.
			cmd := s.ns.Command(s.cg, "/bin/sh", "-i")
			cmd.User = s.user
			cmd.Env = append(os.Environ(), "PS1=", "ENV=", "PATH="+os.Getenv("PATH"))
			tt.start(t, cmd)
			tt.kind(t, pillionPath+" run -- /bin/sh -c 'echo re''ady; read line; echo \"line: $line\"'\n")
			tt.see(t, "ready")
			tt.kind(t, "\x1a")
			tt.screen.Wait(t, "the shell says that the job is stopped", func(l string) bool { return strings.Contains(l, "Stopped") })
			tt.kind(t, "fg\n")
			tt.kind(t, "typed\n")
			tt.see(t, "line: typed")
			tt.kind(t, "exit 8\n")
			if err := cmd.Wait(); cmd.ExitCode() != 8 {
				t.Errorf("%v, want exit code 8", err)
			}
		})
		t.Run("the terminal is closed", func(t *testing.T) {
			tt := newTerminal(t, 24, 80)
			mark := "MARK=" + s.ns.Name
			cmd := s.command(nil, `sleep 1000 & echo ready; wait`)
			cmd.Env = append(os.Environ(), mark)
			tt.start(t, cmd)
			tt.see(t, "ready")
			tt.slave.Close()
			tt.master.Close()
			if err := cmd.Wait(); cmd.ExitCode() != 129 {
				t.Errorf("%v, want exit code 129, of SIGHUP", err)
			}
			testnet.Wait(t, "no process is left", func() bool { return len(processesWith(mark)) == 0 })
		})
		t.Run("a table at the end", func(t *testing.T) {
			w := s.paths()[0]
			saw := make(chan seen, 1)
			to := w.start(echo(saw))
			tt := newTerminal(t, 24, 200)
			cmd := s.command(nil, client(to))
			tt.start(t, cmd)
			if err := cmd.Wait(); err != nil {
				t.Errorf("%v", err)
			}
			tt.screen.Wait(t, "the report", func(l string) bool { return strings.Contains(l, to.String()) })
		})
	})
}
