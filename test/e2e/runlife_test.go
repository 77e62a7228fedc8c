// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/pillionproxy/pillion/test/testnet"
)

// TestRunInANamedNamespace: by name, path and process.
func TestRunInANamedNamespace(t *testing.T) {
	t.Parallel()
	s := newSession(t)
	w := s.paths()[0]
	for _, netns := range []string{s.ns.Name, s.ns.Path(), strconv.Itoa(s.app.Pid())} {
		t.Run(netns, func(t *testing.T) {
			saw := make(chan seen, 1)
			to := w.start(echo(saw))
			// Run from another namespace, out of which the server cannot be reached.
			elsewhere := s.net.Namespace("elsewhere")
			cmd := elsewhere.Command(s.cg, carrierPath, "run", "--netns", netns, "--report", "table", "--", "/bin/sh", "-c", client(to)+" && exit 5")
			r := run(t, cmd)
			if r.code != 5 || !strings.Contains(r.stderr, to.String()) {
				t.Fatalf("exit code %d, want 5, and %s in the report\n%s", r.code, to, r.stderr)
			}
			if server := <-saw; !w.ports.Contains(server.peer.Port()) {
				t.Errorf("the server's peer is %s, want a port of %s", server.peer, w.ports)
			}
		})
	}
}

// TestTwoRunsAtOnce share a namespace, and nothing else: each captures its own command.
func TestTwoRunsAtOnce(t *testing.T) {
	eachSession(t, func(t *testing.T, s *session) {
		before := s.snapshot()
		w := s.paths()[0]
		type running struct {
			cmd   *testnet.Cmd
			out   *testnet.Lines
			start *os.File
			to    netip.AddrPort
			saw   chan seen
		}
		var runs []*running
		for i := range 2 {
			read, write, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer read.Close()
			defer write.Close()
			x := &running{out: &testnet.Lines{}, start: write, saw: make(chan seen, 1)}
			x.to = w.start(echo(x.saw))
			x.cmd = s.command([]string{"--report", "table"}, "echo ready; read x; "+client(x.to)+"; exit "+strconv.Itoa(i+1))
			x.cmd.Stdin, x.cmd.Stdout, x.cmd.Stderr = read, x.out, x.out
			if err := x.cmd.Start(); err != nil {
				t.Fatal(err)
			}
			x.out.Wait(t, "the command is ready", func(l string) bool { return l == "ready" })
			runs = append(runs, x)
		}
		for i, x := range runs {
			if _, err := x.start.WriteString("go\n"); err != nil {
				t.Fatal(err)
			}
			if err := x.cmd.Wait(); x.cmd.ExitCode() != i+1 {
				t.Errorf("run %d: %v, want exit code %d\n%s", i, err, i+1, x.out)
			}
			other := runs[1-i]
			if got := x.out.String(); !strings.Contains(got, x.to.String()) || strings.Contains(got, other.to.String()) {
				t.Errorf("run %d: the report must tell of %s and not of %s:\n%s", i, x.to, other.to, got)
			}
			if server := <-x.saw; !w.ports.Contains(server.peer.Port()) {
				t.Errorf("run %d: the server's peer is %s, want a port of %s", i, server.peer, w.ports)
			}
		}
		same(t, "after both runs", before, s.snapshot())
	})
}

// TestRunKilled: after SIGKILL of run nothing captures any more, and the next run works.
func TestRunKilled(t *testing.T) {
	t.Parallel()
	s := newSession(t)
	before := s.snapshot()
	cmd := s.command(nil, "echo ready; while :; do read x; done")
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	defer write.Close()
	out := &testnet.Lines{}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = read, out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	out.Wait(t, "the command is ready", func(l string) bool { return l == "ready" })
	dirs, err := filepath.Glob(filepath.Join(s.cg.Path, "pillion-run-*"))
	if err != nil || len(dirs) != 1 {
		t.Fatalf("cgroups of run: %q, %v", dirs, err)
	}
	// A process that does not end with run, in the cgroup that was captured.
	survivor := s.ns.Agent(s.cg)
	if err := os.WriteFile(filepath.Join(dirs[0], "cgroup.procs"), []byte(strconv.Itoa(survivor.Pid())), 0); err != nil {
		t.Fatal(err)
	}
	cmd.Kill()
	captured := s.cg.Existing(filepath.Base(dirs[0]))
	testnet.Wait(t, "nothing is attached any more", func() bool {
		// Without tcx the filters stay until the next run, but see no marked packet any more.
		return len(captured.Programs()) == 0 && (len(s.snapshot().Filters) == len(before.Filters) || !testnet.TCX.Have())
	})
	for _, w := range s.paths()[:3] {
		saw := make(chan seen, 1)
		to := w.start(echo(saw))
		c, err := survivor.Dial(testnet.Dial{To: to.String(), Mapped: w.name == "out/mapped"})
		if err != nil {
			t.Fatalf("%s: %v", w.name, err)
		}
		if err := exchange(c, "direct"); err != nil {
			t.Errorf("%s: %v", w.name, err)
		}
		c.Close()
		if server := <-saw; server.peer != unmap(c.Own) {
			t.Errorf("%s: the server's peer is %s, want the client's own socket %s", w.name, server.peer, c.Own)
		}
	}
	for _, w := range s.paths()[3:] {
		s.direct(t, w)
	}
	must(t, "the next run", run(t, s.command(nil, "true")))
	after := s.snapshot()
	after.Sysctls = before.Sysctls // what they were, only the one that was killed knew; they capture nothing
	same(t, "after the next run", before, after)
}

// TestRunEndsWhatTheCommandLeft: a process in the background does not keep run from ending, and does not go on
// uncaptured; with --wait-all it is waited for.
func TestRunEndsWhatTheCommandLeft(t *testing.T) {
	eachSession(t, func(t *testing.T, s *session) {
		for i, tt := range []struct{ name, script string }{
			{"that ends when asked", "sleep 1000 >/dev/null 2>&1 </dev/null & exit 5"},
			{"that does not", `sh -c 'trap "" TERM; while :; do sleep 1000; done' >/dev/null 2>&1 </dev/null & exit 5`},
			{"in a session of its own", "setsid sleep 1000 >/dev/null 2>&1 </dev/null & exit 5"},
		} {
			t.Run(tt.name, func(t *testing.T) {
				cmd, mark := s.command(nil, tt.script), fmt.Sprintf("MARK=%s-%d", s.ns.Name, i)
				cmd.Env = append(os.Environ(), mark)
				r := run(t, cmd)
				if r.code != 5 || len(processesWith(mark)) > 0 || !strings.Contains(r.stderr, "background") {
					t.Errorf("exit code %d, want 5; the process is left: %v; and it was said: %q", r.code, len(processesWith(mark)) > 0, r.stderr)
				}
			})
		}
		t.Run("--wait-all", func(t *testing.T) {
			w := s.paths()[0]
			saw := make(chan seen, 1)
			to := w.start(echo(saw))
			file := filepath.Join(s.folder(t), "output")
			r := run(t, s.command([]string{"--wait-all"}, "("+client(to)+" >"+file+" 2>&1 </dev/null) & exit 5"))
			b, err := os.ReadFile(file)
			if r.code != 5 || err != nil || !strings.HasPrefix(string(b), pod4) {
				t.Errorf("exit code %d, want 5; the process in the background said %q (%v)", r.code, b, err)
			}
			if server := <-saw; !w.ports.Contains(server.peer.Port()) {
				t.Errorf("the server's peer is %s, want a port of %s", server.peer, w.ports)
			}
		})
	})
}
