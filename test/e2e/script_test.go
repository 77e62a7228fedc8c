// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pillionproxy/pillion/test/testnet"
	"github.com/rogpeppe/go-internal/testscript"
)

// TestScripts runs testdata/*.txtar, the specification of the command line, each in a pod of its own. Beside the usual
// commands of testscript they have:
//
//	pillion ARGUMENTS         runs the program as root in the pod's namespace; ! pillion must fail
//	exits CODE [as USER] [VAR=VALUE...] pillion ARGUMENTS
//	                          the same, and it must end with the code; USER is root, init (CAP_BPF and CAP_NET_ADMIN), proxy
//	                          (uid 1666 and CAP_NET_RAW) or nobody
//	listen PORT               opens a listener on 127.0.0.1 and [::1] of the pod
//	unchanged                 rules, routes, filters, programs and sysctls are as they were at the start
//
// $CGROUP is the pod's cgroup.
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			t.Parallel()
			p := newPod(t)
			before := p.snapshot()
			testscript.Run(t, testscript.Params{
				Files: []string{file},
				Setup: func(env *testscript.Env) error {
					env.Setenv("CGROUP", p.cg.Path)
					return nil
				},
				Cmds: map[string]func(*testscript.TestScript, bool, []string){
					"pillion": func(ts *testscript.TestScript, neg bool, args []string) {
						if code := p.script(ts, "root", nil, args); (code != 0) != neg {
							ts.Fatalf("exit code %d", code)
						}
					},
					"exits": func(ts *testscript.TestScript, neg bool, args []string) { p.exits(ts, neg, args) },
					"listen": func(ts *testscript.TestScript, _ bool, args []string) {
						for _, host := range []string{"127.0.0.1", "::1"} {
							ln := p.ns.Listen("tcp", net.JoinHostPort(host, args[0]))
							ts.Defer(func() { ln.Close() })
						}
					},
					"unchanged": func(ts *testscript.TestScript, _ bool, _ []string) {
						if diff := cmp.Diff(before, p.snapshot()); diff != "" {
							ts.Fatalf("not as it was at the start (-want +got)\n%s", diff)
						}
					},
				},
			})
		})
	}
}

// exits is the command of that name.
func (p *pod) exits(ts *testscript.TestScript, neg bool, args []string) {
	usage := "usage: exits CODE [as USER] [VAR=VALUE...] pillion ARGUMENTS"
	if neg || len(args) < 2 {
		ts.Fatalf("%s", usage)
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	user := "root"
	args = args[1:]
	if args[0] == "as" && len(args) > 2 {
		user, args = args[1], args[2:]
	}
	i := slices.Index(args, "pillion")
	if i < 0 {
		ts.Fatalf("%s", usage)
	}
	if code := p.script(ts, user, args[:i], args[i+1:]); code != want {
		ts.Fatalf("exit code %d, want %d", code, want)
	}
}

// script runs the program for a script, whose stdout and stderr its output becomes.
func (p *pod) script(ts *testscript.TestScript, user string, env, args []string) (code int) {
	cmd := p.pillion(args...)
	switch user {
	case "root":
		cmd.Dir = ts.MkAbs(".") // which nobody else may enter
	case "init":
		cmd.User = initUser()
	case "proxy":
		cmd = p.proxyCmd(inside).Cmd
		cmd.Args = append([]string{pillionPath}, args...)
	case "nobody":
		cmd.User = &testnet.User{UID: 65534, GID: 65534}
	default:
		ts.Fatalf("no user %q", user)
	}
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = ts.Stdout(), ts.Stderr()
	if err := cmd.Run(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		ts.Fatalf("%v", err)
	}
	return cmd.ExitCode()
}
