// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	prefix   = "plt-"
	netnsDir = "/run/netns" // where `ip netns` and `--netns NAME` look
	// slownessEnv says how many times slower than a computer of today this one is.
	slownessEnv = "PILLION_TEST_SLOWNESS"
)

// patience bounds every wait for a condition. It is no measure of anything: a wait that ends there has failed.
var patience = 60 * time.Second * slowness()

func slowness() time.Duration {
	n, err := strconv.Atoi(os.Getenv(slownessEnv))
	if err != nil || n < 1 {
		return 1
	}
	return time.Duration(n)
}

// Net is what one test has made. It is not for use by several goroutines at once, but what it hands out is.
type Net struct {
	t      testing.TB
	cgroot string
}

var (
	counter   atomic.Int64
	sweepOnce sync.Once
)

// Short names the tests that -short does not leave out, of those that ask for a network; nil: all. It is set before the
// first test, by a suite in which a few tests ask of the kernel whatever the others do.
var Short []string

// New starts an empty network for the test, after sweeping what dead tests left behind.
func New(t testing.TB) *Net {
	t.Helper()
	NeedRoot(t)
	if top, _, _ := strings.Cut(t.Name(), "/"); testing.Short() && Short != nil && !slices.Contains(Short, top) {
		t.Skip("-short leaves it out")
	}
	root, err := cgroup2Mount()
	if err != nil {
		t.Fatalf("testnet: %v", err)
	}
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		t.Fatalf("testnet: %v", err)
	}
	sweepOnce.Do(func() { sweep(t, root) })
	return &Net{t: t, cgroot: root}
}

// NeedRoot skips the test without root, or fails it when PILLION_REQUIRE_ROOT=1.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "this test needs root")
	}
}

// NeedProgram returns the path of a program, or ends the test as NeedRoot does, naming the Debian package to install.
// Programs in sbin and in Debian's folders of PostgreSQL and Java are found whatever PATH says.
func NeedProgram(t testing.TB, name, pkg string) string {
	t.Helper()
	real := func(path string) string {
		if target, err := filepath.EvalSymlinks(path); err == nil && filepath.Base(target) == name {
			return target
		}
		return path
	}
	// Debian's own first: those of a home directory are not every user's.
	for _, pattern := range []string{"/usr/bin/", "/usr/sbin/", "/bin/", "/sbin/", "/usr/lib/postgresql/*/bin/", "/usr/lib/jvm/*/bin/"} {
		found, _ := filepath.Glob(pattern + name)
		for _, path := range slices.Backward(found) {
			if unix.Access(path, unix.X_OK) == nil {
				return real(path)
			}
		}
	}
	if path, err := exec.LookPath(name); err == nil {
		return real(path)
	}
	missing(t, "this test needs the program %s: apt-get install %s", name, pkg)
	return ""
}

func missing(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("PILLION_REQUIRE_ROOT") == "1" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// Wait returns once the condition holds, and fails the test when it never does. The condition is asked in the test's own
// goroutine.
func Wait(t testing.TB, what string, cond func() bool) {
	t.Helper()
	if !wait(cond) {
		t.Fatalf("waited in vain: %s", what)
	}
}

func wait(cond func() bool) bool {
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if cond() {
			return true
		}
	}
	return cond()
}

// name makes a name that no other test, here or in another process, has.
func (n *Net) name(label string) string {
	return fmt.Sprintf("%s%d-%d-%s", prefix, os.Getpid(), counter.Add(1), label)
}

// sweep removes what tests left behind whose process is gone.
func sweep(t testing.TB, cgroot string) {
	dirs, _ := filepath.Glob(filepath.Join(cgroot, prefix+"*"))
	for _, dir := range dirs {
		if ownerIsDead(filepath.Base(dir)) {
			t.Logf("testnet: sweeping %s, left behind by a dead test", dir)
			if err := removeCgroup(dir); err != nil {
				t.Logf("testnet: %v", err)
			}
		}
	}
	names, _ := filepath.Glob(filepath.Join(netnsDir, prefix+"*"))
	for _, name := range names {
		if ownerIsDead(filepath.Base(name)) {
			t.Logf("testnet: sweeping %s, left behind by a dead test", name)
			if err := unmountNamespace(name); err != nil {
				t.Logf("testnet: %v", err)
			}
		}
	}
}

// ownerIsDead reports whether the name is one of ours and the test that made it is gone.
func ownerIsDead(name string) bool {
	field, _, ok := strings.Cut(strings.TrimPrefix(name, prefix), "-")
	pid, err := strconv.Atoi(field)
	if !ok || err != nil || pid <= 0 {
		return false
	}
	return errors.Is(syscall.Kill(pid, 0), unix.ESRCH)
}

// Left lists the namespaces and cgroups that the tests of this process have made and not removed.
func Left() []string {
	mine := fmt.Sprintf("%s%d-*", prefix, os.Getpid())
	left, _ := filepath.Glob(filepath.Join(netnsDir, mine))
	if root, err := cgroup2Mount(); err == nil {
		dirs, _ := filepath.Glob(filepath.Join(root, mine))
		left = append(left, dirs...)
	}
	return left
}
