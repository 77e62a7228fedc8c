// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/pillionproxy/pillion/test/testnet"
	"golang.org/x/sys/unix"
)

// The addresses of every pod and of the world outside it.
const (
	pod4, pod6       = "10.77.0.2", "fd77::2"
	second4, second6 = "10.77.0.3", "fd77::3"     // of the pod, not chosen by itself
	client4, client6 = "10.77.0.1", "fd77::1"     // of the world, on the pod's link
	server4, server6 = "10.99.0.1", "fd99::1"     // of the world, behind it
	nobody4, nobody6 = "10.98.0.1", "fd98::1"     // routed to the world, which drops it: a black hole
	absent4, absent6 = "10.77.0.200", "fd77::200" // on the pod's own link, but not there
)

// pod is a network namespace as a pod has one, with a captured cgroup, and the world outside, joined to it by one link.
type pod struct {
	t       *testing.T
	net     *testnet.Net
	ns, ext *testnet.Namespace
	// cg is the captured cgroup. The others are containers in it.
	cg, appCG, initCG, proxyCG *testnet.Cgroup
	app                        *testnet.Agent // in appCG
	proxy                      *sidecar       // the last one started
	by                         backend        // of init; zero: ebpf, by the cgroup
	asRoot                     bool           // init has every capability
}

// newPod makes a pod in which nothing is installed.
func newPod(t *testing.T) *pod {
	t.Helper()
	n := testnet.New(t)
	p := &pod{t: t, net: n, ns: n.Namespace("pod"), ext: n.Namespace("ext"), cg: n.Cgroup("pod")}
	testnet.Link(p.ns, "eth0", p.ext, "v0")
	p.ns.Addr("eth0", pod4+"/24", second4+"/24", pod6+"/64")
	p.ns.DeprecatedAddr("eth0", second6+"/64")
	p.ext.Addr("v0", client4+"/24", client6+"/64")
	p.ext.Addr("lo", server4+"/32", server6+"/128")
	p.ns.DefaultRoute(client4, client6)
	p.appCG, p.initCG, p.proxyCG = p.cg.Child("app"), p.cg.Child("init"), p.cg.Child("proxy")
	p.app = p.ns.Agent(p.appCG)
	return p
}

// newCaptured makes a pod in which init has run and the proxy is ready.
func newCaptured(t *testing.T, where placement) *pod {
	t.Helper()
	p := newPod(t)
	p.init()
	p.startProxy(where)
	return p
}

// result is what a program that has ended said.
type result struct {
	code           int
	stdout, stderr string
}

// initUser is root with exactly the capabilities that init needs.
func initUser() *testnet.User {
	return &testnet.User{Caps: []uintptr{unix.CAP_BPF, unix.CAP_NET_ADMIN}, NoNewPrivs: true}
}

// run runs a command to its end.
func run(t testing.TB, cmd *testnet.Cmd) result {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		t.Fatalf("%v: %v", cmd.Args, err)
	}
	return result{cmd.ExitCode(), out.String(), errs.String()}
}

// pillion prepares the program as root in the pod's namespace, outside of its cgroup.
func (p *pod) pillion(args ...string) *testnet.Cmd {
	return p.ns.Command(nil, pillionPath, args...)
}

// initCmd prepares `pillion init` as an init container would run it.
func (p *pod) initCmd(args ...string) *testnet.Cmd {
	if len(p.by.args) > 0 {
		cmd := p.pillion(append(append([]string{"init"}, p.by.args...), args...)...)
		cmd.Env = append(os.Environ(), p.by.env...)
		return cmd
	}
	cmd := p.ns.Command(p.initCG, pillionPath, append([]string{"init", "--cgroup", p.cg.Path}, args...)...)
	if !p.asRoot {
		cmd.User = initUser()
	}
	return cmd
}

// init installs the capture.
func (p *pod) init(args ...string) {
	p.t.Helper()
	must(p.t, "init", run(p.t, p.initCmd(args...)))
}

// clean takes the capture away, as root with everything.
func (p *pod) clean() result {
	p.t.Helper()
	if len(p.by.args) > 0 {
		return run(p.t, p.pillion("clean"))
	}
	return run(p.t, p.pillion("clean", "--cgroup", p.cg.Path))
}

// must fails the test unless the program ended with 0.
func must(t testing.TB, what string, r result) {
	t.Helper()
	if r.code != 0 {
		t.Fatalf("%s: exit code %d\n%s%s", what, r.code, r.stdout, r.stderr)
	}
}

// wantFault checks that a program failed as its users need it to: the exit code, one line that says what happened
// (containing all of says), and one with a hint.
func wantFault(t testing.TB, r result, code int, says ...string) {
	t.Helper()
	if r.code != code {
		t.Errorf("exit code %d, want %d", r.code, code)
	}
	for _, s := range append(says, "pillion: ", "hint: ") {
		if !strings.Contains(r.stderr, s) {
			t.Errorf("standard error does not say %q", s)
		}
	}
	if t.Failed() {
		t.Logf("standard error:\n%s", r.stderr)
	}
}
