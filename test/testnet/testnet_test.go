// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

type whoami struct {
	PID, UID        int
	Cgroup, Caps    string
	Bounding, NoNew string
}

// who tells who the agent is, as the kernel sees it.
var who = NewOp("who", func(struct{}) (whoami, error) {
	w := whoami{PID: os.Getpid(), UID: os.Geteuid()}
	cg, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return w, err
	}
	for _, line := range strings.Split(string(cg), "\n") {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			w.Cgroup = path
		}
	}
	status, err := os.ReadFile("/proc/self/status")
	for _, line := range strings.Split(string(status), "\n") {
		key, value, _ := strings.Cut(line, ":")
		switch value = strings.TrimSpace(value); key {
		case "CapEff":
			w.Caps = strings.TrimLeft(value, "0")
		case "CapBnd":
			w.Bounding = strings.TrimLeft(value, "0")
		case "NoNewPrivs":
			w.NoNew = value
		}
	}
	return w, err
})

// orphan starts a process that outlives the agent, and returns its pid.
var orphan = NewOp("orphan", func(struct{}) (int, error) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{orphanEnv + "=1"}
	err := cmd.Start()
	if err != nil {
		return 0, err
	}
	return cmd.Process.Pid, nil
})

const (
	orphanEnv = "TESTNET_ORPHAN"
	faultEnv  = "TESTNET_FAULT"
)

func TestMain(m *testing.M) {
	if os.Getenv(orphanEnv) != "" {
		time.Sleep(time.Hour) // until it is killed; select {} would be a deadlock, which Go ends by itself
	}
	AgentMain(who, orphan)
	os.Exit(Main(m))
}

// pair is two joined namespaces.
func pair(t *testing.T) (n *Net, pod, ext *Namespace) {
	n = New(t)
	pod, ext = n.Namespace("pod"), n.Namespace("ext")
	Link(pod, "eth0", ext, "v0")
	pod.Addr("eth0", "10.77.0.2/24", "fd77::2/64")
	ext.Addr("v0", "10.77.0.1/24", "fd77::1/64")
	ext.Addr("lo", "10.99.0.1/32", "fd99::1/128")
	pod.DefaultRoute("10.77.0.1", "fd77::1")
	return n, pod, ext
}

func echo(c *net.TCPConn) { _, _ = io.Copy(c, c) }

func TestTrafficCrossesTheLink(t *testing.T) {
	n, pod, ext := pair(t)
	app := pod.Agent(n.Cgroup("pod").Child("app"))
	ext.Serve("tcp", "[::]:80", echo)
	for _, d := range []Dial{
		{To: "10.99.0.1:80"},
		{To: "[fd99::1]:80"},
		{To: "10.99.0.1:80", Mapped: true},
		{To: "10.99.0.1:80", NonBlock: true},
		{To: "10.99.0.1:80", MPTCP: true},
		{To: "[fd99::1]:80", From: "[fd77::2]:7777"},
		{To: "10.99.0.1:80", FastOpen: []byte("x")},
		{To: "10.99.0.1:80", Device: "eth0", Mark: 1},
	} {
		t.Run(fmt.Sprintf("%+v", d), func(t *testing.T) {
			if d.MPTCP {
				Need(t, MPTCP)
			}
			c, err := app.Dial(d)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if len(d.FastOpen) == 0 {
				if _, err := c.Write([]byte("x")); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			if d.Mapped != c.Peer.Addr().Is4In6() || netip.AddrPortFrom(c.Peer.Addr().Unmap(), c.Peer.Port()).String() != d.To {
				t.Errorf("getpeername said %s, want %s, mapped: %v", c.Peer, d.To, d.Mapped)
			}
			if want := netip.MustParseAddr("10.77.0.2"); c.Own.Addr().Is4() && c.Own.Addr() != want {
				t.Errorf("getsockname said %s, want %s", c.Own, want)
			}
		})
	}
	for _, nonblock := range []bool{false, true} {
		if _, err := app.Dial(Dial{To: "10.99.0.1:81", NonBlock: nonblock}); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("closed port, nonblock %v: %v, want ECONNREFUSED", nonblock, err)
		}
	}
}

func TestServerInTheAgentsCgroup(t *testing.T) {
	n, pod, ext := pair(t)
	app := pod.Agent(n.Cgroup("pod"))
	srv := app.Serve("tcp", "[::]:0", echo)
	for _, host := range []string{"10.77.0.2", "fd77::2"} {
		c, err := ext.Dial("tcp", net.JoinHostPort(host, fmt.Sprint(srv.Addr.Port())))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	// The two connections that the server accepted.
	seen := 0
	for _, s := range pod.Sockets() {
		if s.State == Established && s.Local.Port() == srv.Addr.Port() {
			seen++
		}
	}
	if seen != 2 {
		t.Errorf("/proc/net/tcp shows %d connections of the server, want 2: %v", seen, pod.Sockets())
	}
}

// TestAgentIsWhoItIsSaidToBe: cgroup, user, and exactly the capabilities.
func TestAgentIsWhoItIsSaidToBe(t *testing.T) {
	n := New(t)
	ns, cg := n.Namespace("ns"), n.Cgroup("cg")
	root := strings.TrimPrefix(cg.Path, n.cgroot)
	for _, tt := range []struct {
		name string
		user *User
		want whoami
	}{
		{
			"uid 1666 with CAP_NET_RAW", &User{UID: 1666, GID: 1666, Caps: []uintptr{unix.CAP_NET_RAW}, NoNewPrivs: true},
			whoami{UID: 1666, Cgroup: root, Caps: "2000", Bounding: "2000", NoNew: "1"},
		},
		{
			"uid 1666 without any", &User{UID: 1666, GID: 1666, Caps: []uintptr{}},
			whoami{UID: 1666, Cgroup: root, NoNew: "0"},
		},
		{
			"root with CAP_BPF and CAP_NET_ADMIN", &User{Caps: []uintptr{unix.CAP_BPF, unix.CAP_NET_ADMIN}},
			whoami{Cgroup: root, Caps: "8000001000", Bounding: "8000001000", NoNew: "0"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := ns.AgentAs(cg, tt.user)
			got, err := who.Call(a, struct{}{})
			if err != nil {
				t.Fatal(err)
			}
			tt.want.PID = a.Pid()
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

func TestAgentKilled(t *testing.T) {
	n := New(t)
	ns, cg := n.Namespace("ns"), n.Cgroup("cg")
	a := ns.Agent(cg)
	pid, err := orphan.Call(a, struct{}{})
	if err != nil {
		t.Fatal(err)
	}
	if got := cg.Procs(); !slices.Contains(got, pid) || !slices.Contains(got, a.Pid()) {
		t.Fatalf("processes of the cgroup: %v, want %d and %d among them", got, a.Pid(), pid)
	}
	// A call that is under way when the agent is killed ends.
	pending := make(chan error, 1)
	go func() {
		_, err := a.Dial(Dial{To: "127.0.0.1:1", NonBlock: true, From: "127.0.0.1:0"})
		pending <- err
		_, err = who.Call(a, struct{}{})
		for err == nil {
			_, err = who.Call(a, struct{}{})
		}
		pending <- err
	}()
	if err := <-pending; !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial: %v, want ECONNREFUSED", err)
	}
	a.Kill()
	if err := <-pending; !errors.Is(err, ErrAgentGone) {
		t.Errorf("call to a killed agent: %v, want ErrAgentGone", err)
	}
	if got := cg.Procs(); !slices.Contains(got, pid) {
		t.Fatalf("processes of the cgroup after the agent was killed: %v, want %d among them", got, pid)
	}
	// The orphan is the cleanup's business: Main sees to it that the cgroup is gone, TestCleanup that the process is.
}

func TestDoLeavesTheThreadAsItWas(t *testing.T) {
	n := New(t)
	a, b := n.Namespace("a"), n.Namespace("b")
	here := func() string {
		s, err := os.Readlink("/proc/thread-self/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	before := here()
	var inA, inB, inAAgain string
	a.Do(func() {
		inA = here()
		b.Do(func() { inB = here() })
		inAAgain = here()
	})
	func() {
		defer func() { _ = recover() }()
		a.Do(func() { panic("as a failing test would") })
	}()
	if after := here(); after != before || inA == before || inA == inB || inA != inAAgain {
		t.Errorf("before %s, in a %s, in b %s, in a again %s, after %s", before, inA, inB, inAAgain, after)
	}
}

// TestCleanup runs this very test binary, which fails in one way or another after it has made one of everything, and
// looks for what is left.
func TestCleanup(t *testing.T) {
	NeedRoot(t)
	for _, fault := range []string{"fatal", "panic", "panic in a subtest", "kill the agent", "none"} {
		t.Run(fault, func(t *testing.T) {
			pid, pids, out := runFault(t, fault)
			if failed := strings.Contains(out, "FAIL"); failed != (fault != "none" && fault != "kill the agent") {
				t.Errorf("test failed: %v\n%s", failed, out)
			}
			if left := leftOf(pid, pids); len(left) > 0 {
				t.Errorf("left behind: %v\n%s", left, out)
			}
		})
	}
	t.Run("killed, then swept", func(t *testing.T) {
		pid, pids, out := runFault(t, "kill the test")
		left := leftOf(pid, pids)
		// Its agent ends with it, the orphan does not.
		if len(left) < 3 {
			t.Fatalf("a killed test left only %v: there is nothing to sweep, so this test shows nothing\n%s", left, out)
		}
		n := New(t)
		sweep(t, n.cgroot)
		Wait(t, "nothing is left after the sweep", func() bool { return len(leftOf(pid, pids)) == 0 })
	})
}

// runFault runs TestFault in a process of its own and returns its pid, the processes that it made, and what it printed.
func runFault(t *testing.T, fault string) (pid int, pids []int, out string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "output")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestFault$", "-test.v")
	cmd.Env = append(os.Environ(), faultEnv+"="+fault)
	cmd.Stdout, cmd.Stderr = f, f // a file: an orphan that holds a pipe would hold us
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // fails, mostly
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var agent, child int
	_, after, _ := strings.Cut(string(b), "made: ")
	if _, err := fmt.Sscanf(after, "%d %d", &agent, &child); err != nil {
		t.Fatalf("%v in\n%s", err, b)
	}
	return cmd.Process.Pid, []int{agent, child}, string(b)
}

// leftOf lists what a test process has left behind.
func leftOf(pid int, pids []int) (left []string) {
	root, err := cgroup2Mount()
	if err != nil {
		return []string{err.Error()}
	}
	for _, dir := range []string{root, netnsDir} {
		found, _ := filepath.Glob(filepath.Join(dir, fmt.Sprintf("%s%d-*", prefix, pid)))
		left = append(left, found...)
	}
	for _, p := range pids {
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p)); err == nil && !strings.Contains(string(b), ") Z ") {
			left = append(left, fmt.Sprintf("process %d", p))
		}
	}
	return left
}

// TestFault is the test that fails, for TestCleanup. By itself it does nothing.
func TestFault(t *testing.T) {
	fault := os.Getenv(faultEnv)
	if fault == "" {
		return
	}
	n, pod, ext := pair(t)
	agent := pod.Agent(n.Cgroup("pod").Child("app"))
	child, err := orphan.Call(agent, struct{}{})
	if err != nil {
		t.Fatal(err)
	}
	ext.Serve("tcp", "[::]:80", echo)
	c, err := agent.Dial(Dial{To: "10.99.0.1:80"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Printf("made: %d %d\n", agent.Pid(), child)
	switch fault {
	case "fatal":
		pod.Do(func() { t.Fatal("on purpose") })
	case "panic":
		panic("on purpose")
	case "panic in a subtest":
		t.Run("sub", func(*testing.T) { panic("on purpose") })
	case "kill the agent":
		agent.Kill()
	case "kill the test":
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
}
