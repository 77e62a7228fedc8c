// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/pillionproxy/pillion/test/testnet"
)

// session is a place in which a user runs `pillion run`: a network namespace, and a cgroup as a login session has one.
type session struct {
	*pod
	cg   *testnet.Cgroup
	user *testnet.User // nil: root
}

func newSession(t *testing.T) *session {
	t.Helper()
	p := newPod(t)
	return &session{pod: p, cg: p.net.Cgroup("session")}
}

// eachSession runs a test of what is the same for root, whose command is captured by the backend ebpf, and for an ordinary user.
func eachSession(t *testing.T, test func(*testing.T, *session)) {
	for name, user := range map[string]*testnet.User{"as root": nil, "as an ordinary user": ordinary} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSession(t)
			s.user = user
			test(t, s)
		})
	}
}

// folder is one in which the user of the session may write.
func (s *session) folder(t *testing.T) string {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err == nil {
		err = errors.Join(os.Chmod(filepath.Dir(dir), 0o755), os.Chmod(dir, 0o777))
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// command prepares `pillion run` with its flags, and a shell script behind the --.
func (s *session) command(flags []string, script string, args ...string) *testnet.Cmd {
	return s.raw(flags, append([]string{"/bin/sh", "-c", script}, args...)...)
}

func (s *session) raw(flags []string, command ...string) *testnet.Cmd {
	args := append(append([]string{"run"}, flags...), "--")
	cmd := s.ns.Command(s.cg, carrierPath, append(args, command...)...)
	cmd.User = s.user
	return cmd
}

// client is a shell word that runs this test binary as a client that makes one exchange with the server and prints its
// own address.
func client(to netip.AddrPort) string { return fmt.Sprintf("%s=%s %s", childEnv, to, selfPath) }

// TestRunEndsAsTheCommand: the exit code is the command's, or what a shell says.
func TestRunEndsAsTheCommand(t *testing.T) {
	eachSession(t, func(t *testing.T, s *session) {
		before := s.snapshot()
		notExecutable := filepath.Join(s.folder(t), "file")
		if err := os.WriteFile(notExecutable, []byte("#!/bin/sh\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		for _, tt := range []struct {
			name    string
			command []string
			code    int
		}{
			{"0", []string{"true"}, 0},
			{"7", []string{"/bin/sh", "-c", "exit 7"}, 7},
			{"255", []string{"/bin/sh", "-c", "exit 255"}, 255},
			{"SIGTERM", []string{"/bin/sh", "-c", "kill -TERM $$"}, 143},
			{"SIGKILL", []string{"/bin/sh", "-c", "kill -KILL $$"}, 137},
			{"not found", []string{"no-such-command-anywhere"}, 127},
			{"no such file", []string{"/no/such/file"}, 127},
			{"not executable", []string{notExecutable}, 126},
		} {
			t.Run(tt.name, func(t *testing.T) {
				r := run(t, s.raw(nil, tt.command...))
				if r.code != tt.code {
					t.Errorf("exit code %d, want %d\n%s", r.code, tt.code, r.stderr)
				}
				if r.stdout != "" || (r.stderr != "") != (tt.code == 126 || tt.code == 127) {
					t.Errorf("stdout %q, stderr %q; want nothing, or a message where the command did not run", r.stdout, r.stderr)
				}
				same(t, "after run", before, s.snapshot())
			})
		}
	})
}

// TestRunTouchesNothingOfTheCommand: input, output, directory, environment, arguments.
func TestRunTouchesNothingOfTheCommand(t *testing.T) {
	eachSession(t, func(t *testing.T, s *session) {
		dir := s.folder(t)
		cmd := s.command(nil, `printf 'a\0b\377'; cat; pwd; echo "$FOO"; echo "$@"; echo complaint >&2`, "sh", "--report", "a b", "")
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "FOO=bar baz")
		cmd.Stdin = strings.NewReader("input\n")
		r := run(t, cmd)
		want := result{0, "a\x00b\xffinput\n" + dir + "\nbar baz\n--report a b \n", "complaint\n"}
		if r != want {
			t.Errorf("got  %+v\nwant %+v", r, want)
		}
		long := strings.Repeat("x", 100_000)
		if r := run(t, s.command(nil, `echo ${#1}`, "sh", long)); r.stdout != "100000\n" {
			t.Errorf("of a long argument the command says %q\n%s", r.stdout, r.stderr)
		}
	})
}

// TestRunCaptures: the connections of the command go through the sidecar, and the report tells of them.
func TestRunCaptures(t *testing.T) {
	eachSession(t, func(t *testing.T, s *session) {
		before := s.snapshot()
		for _, w := range s.paths()[:2] {
			for _, format := range []string{"table", "json"} {
				for _, toFile := range []bool{false, true} {
					t.Run(fmt.Sprintf("%s/%s/to a file %v", w.name, format, toFile), func(t *testing.T) {
						saw := make(chan seen, 1)
						to := w.start(echo(saw))
						flags := []string{"--report", format}
						file := filepath.Join(s.folder(t), "report")
						if toFile {
							flags = append(flags, "--report-file", file)
						}
						r := run(t, s.command(flags, client(to)))
						must(t, "run", r)
						own, err := netip.ParseAddrPort(strings.TrimSpace(r.stdout))
						if err != nil {
							t.Fatalf("standard output is not the command's alone: %q", r.stdout)
						}
						if server := <-saw; !w.ports.Contains(server.peer.Port()) || server.peer.Addr() != w.from || own.Addr() != w.from {
							t.Errorf("client %s, the server's peer %s; want address %s and a port of %s", own, server.peer, w.from, w.ports)
						}
						report := r.stderr
						if toFile {
							b, err := os.ReadFile(file)
							if err != nil {
								t.Fatal(err)
							}
							if r.stderr != "" {
								t.Errorf("the report is in a file, but standard error says %q", r.stderr)
							}
							report = string(b)
						}
						if format == "json" && !json.Valid([]byte(report)) {
							t.Errorf("not JSON:\n%s", report)
						}
						for _, part := range []string{to.String(), "outbound", strconv.Itoa(len("through the sidecar"))} {
							if !strings.Contains(strings.ToLower(report), part) && !(format == "table" && part == "outbound" && strings.Contains(report, "out")) {
								t.Errorf("the report does not say %q:\n%s", part, report)
							}
						}
					})
				}
			}
		}
		if s.user != nil {
			return
		}
		t.Run("a server", func(t *testing.T) {
			ready := &testnet.Lines{}
			cmd := s.command([]string{"--report", "json"}, servingChild("[::]:7070"))
			report := &testnet.Lines{}
			cmd.Stdout, cmd.Stderr = ready, report
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ready.Wait(t, "the server listens", func(l string) bool { return l == "listening" })
			for _, host := range []string{pod4, pod6} {
				c, err := s.ext.Dial("tcp", netip.AddrPortFrom(netip.MustParseAddr(host), 7070).String())
				if err != nil {
					t.Fatal(err)
				}
				if err := exchange(c, "to the server"); err != nil {
					t.Error(err)
				}
				if err := finish(c); err != nil {
					t.Error(err)
				}
			}
			cmd.Signal(syscall.SIGTERM)
			if err := cmd.Wait(); cmd.ExitCode() != 143 {
				t.Errorf("%v, want 143, of SIGTERM", err)
			}
			got := report.String()
			if strings.Count(got, `"inbound"`) != 2 || !strings.Contains(got, client4+":") || !strings.Contains(got, "["+client6+"]:") {
				t.Errorf("the report does not tell of both inbound connections:\n%s", got)
			}
		})
		same(t, "after all runs", before, s.snapshot())
	})
}

// TestRunForwardsSignals that are sent to run alone.
func TestRunForwardsSignals(t *testing.T) {
	eachSession(t, func(t *testing.T, s *session) {
		for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT, syscall.SIGUSR1} {
			t.Run(sig.String(), func(t *testing.T) {
				cmd := s.command(nil, fmt.Sprintf("trap 'echo got; exit 3' %d; echo ready; while :; do read x; done", sig))
				out := &testnet.Lines{}
				cmd.Stdout, cmd.Stderr = out, out
				stdin, err := cmd.StdinPipe() // never written to: read waits
				if err != nil {
					t.Fatal(err)
				}
				defer stdin.Close()
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				out.Wait(t, "the command is ready", func(l string) bool { return l == "ready" })
				cmd.Signal(sig)
				if err := cmd.Wait(); cmd.ExitCode() != 3 || out.String() != "ready\ngot\n" {
					t.Errorf("%v, output %q; want exit code 3 and the trap's message", err, out.String())
				}
			})
		}
	})
}

// TestRunAsTheInvokingUser: sudo says who called it; the command is theirs, with no privilege left.
func TestRunAsTheInvokingUser(t *testing.T) {
	t.Parallel()
	s := newSession(t)
	cmd := s.command(nil, `id -u; id -g; id -G; grep -E '^Cap(Eff|Prm|Amb)' /proc/self/status | sort`)
	cmd.Env = append(os.Environ(), "SUDO_UID=65534", "SUDO_GID=65534", "SUDO_USER=nobody")
	r := run(t, cmd)
	none := "\t0000000000000000\n"
	if want := "65534\n65534\n65534\nCapAmb:" + none + "CapEff:" + none + "CapPrm:" + none; r.stdout != want || r.code != 0 {
		t.Errorf("exit code %d, output\n%swant\n%s%s", r.code, r.stdout, want, r.stderr)
	}
	w := s.paths()[0]
	saw := make(chan seen, 1)
	to := w.start(echo(saw))
	cmd = s.command(nil, client(to))
	cmd.Env = append(os.Environ(), "SUDO_UID=65534", "SUDO_GID=65534", "SUDO_USER=nobody")
	must(t, "run", run(t, cmd))
	if server := <-saw; !w.ports.Contains(server.peer.Port()) {
		t.Errorf("the server's peer is %s, want a port of %s", server.peer, w.ports)
	}
}

// TestRunUnderNohup: what whoever starts run wants ignored stays ignored, by the command too.
func TestRunUnderNohup(t *testing.T) {
	eachSession(t, func(t *testing.T, s *session) {
		const ignored = `grep SigIgn /proc/self/status`
		for _, program := range []string{"", carrierPath + " run -- "} {
			cmd := s.ns.Command(s.cg, "/bin/sh", "-c", fmt.Sprintf("trap '' HUP INT; exec %s/bin/sh -c '%s'", program, ignored))
			cmd.User = s.user
			r := run(t, cmd)
			_, mask, _ := strings.Cut(strings.TrimSpace(r.stdout), "\t")
			if set, err := strconv.ParseUint(mask, 16, 64); err != nil || set&3 != 3 { // of signals 1 and 2
				t.Errorf("%q: exit code %d, %q\n%s", program, r.code, r.stdout, r.stderr)
			}
		}
	})
}
