// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/test/testnet"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// child names, in the environment, what a copy of the test binary does instead of testing.
const child = "PILLION_LIFECYCLE_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(child) == "drop" {
		dropAndTell()
		return
	}
	goleak.VerifyTestMain(m)
}

// dropAndTell prints what each thread may do after DropPrivileges, or why it failed.
func dropAndTell() {
	for range 4 { // some more threads
		go func() {
			unix.Nanosleep(&unix.Timespec{Sec: 60}, nil)
		}()
	}
	time.Sleep(50 * time.Millisecond)
	if err := DropPrivileges(slog.New(slog.DiscardHandler)); err != nil {
		fmt.Printf("exit %d: %v\nhint: %s\n", config.ExitOf(err), err, config.HintOf(err))
		return
	}
	tasks, _ := filepath.Glob("/proc/self/task/*/status")
	for _, task := range tasks {
		status, _ := os.ReadFile(task)
		for line := range strings.Lines(string(status)) {
			if strings.HasPrefix(line, "Cap") || strings.HasPrefix(line, "NoNewPrivs") {
				fmt.Print(strings.Join(strings.Fields(line), " "), "\n")
			}
		}
	}
}

// runChild runs dropAndTell in a process of its own.
func runChild(t *testing.T, attr *os.ProcAttr) string {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("PILLION_REQUIRE_ROOT") == "1" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	exe := filepath.Join("/tmp", fmt.Sprintf("pillion-lifecycle-test-%d", os.Getpid())) // where another user may execute it
	copyFile(t, "/proc/self/exe", exe)
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	attr.Env = []string{child + "=drop"}
	attr.Files = []*os.File{nil, in, os.Stderr}
	p, err := os.StartProcess(exe, []string{exe}, attr)
	in.Close()
	if err != nil {
		t.Fatal(err)
	}
	said, err := io.ReadAll(out)
	if _, werr := p.Wait(); err != nil || werr != nil {
		t.Fatal(err, werr)
	}
	return string(said)
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(to) })
	if err := os.WriteFile(to, data, 0o755); err != nil {
		t.Fatal(err)
	}
}

const none, netRaw = "0000000000000000", "0000000000002000"

func TestDropPrivilegesOfAllThreads(t *testing.T) {
	marking := netRaw // what it takes to mark packets, of those who have it
	if !testnet.RawMark.Have() {
		marking = "0000000000003000" // and CAP_NET_ADMIN
	}
	for _, tt := range []struct {
		name     string
		attr     os.ProcAttr
		left     string
		bounding string // "" : not looked at
	}{
		{"root", os.ProcAttr{}, marking, netRaw},
		{"a user with ambient CAP_NET_RAW", os.ProcAttr{Sys: &syscall.SysProcAttr{
			Credential: &syscall.Credential{Uid: config.ProxyUID, Gid: config.ProxyUID}, AmbientCaps: []uintptr{unix.CAP_NET_RAW},
		}}, netRaw, ""},
		{"a user with more than that", os.ProcAttr{Sys: &syscall.SysProcAttr{
			Credential:  &syscall.Credential{Uid: config.ProxyUID, Gid: config.ProxyUID},
			AmbientCaps: []uintptr{unix.CAP_NET_RAW, unix.CAP_NET_ADMIN, unix.CAP_SETPCAP},
		}}, marking, netRaw},
		{"a user with nothing", os.ProcAttr{Sys: &syscall.SysProcAttr{
			Credential: &syscall.Credential{Uid: config.ProxyUID, Gid: config.ProxyUID},
		}}, none, ""},
		{"a user with anything but CAP_NET_RAW", os.ProcAttr{Sys: &syscall.SysProcAttr{
			Credential:  &syscall.Credential{Uid: config.ProxyUID, Gid: config.ProxyUID},
			AmbientCaps: []uintptr{unix.CAP_NET_ADMIN, unix.CAP_SETPCAP},
		}}, none, netRaw},
	} {
		t.Run(tt.name, func(t *testing.T) {
			said := runChild(t, &tt.attr)
			want := map[string]string{
				"CapInh:": none, "CapPrm:": tt.left, "CapEff:": tt.left, "CapAmb:": none, "NoNewPrivs:": "1",
			}
			if tt.bounding != "" {
				want["CapBnd:"] = tt.bounding
			}
			threads := 0
			for line := range strings.Lines(said) {
				field, value, _ := strings.Cut(strings.TrimSpace(line), " ")
				if w, ok := want[field]; ok && value != w {
					t.Errorf("%s %s, want %s", field, value, w)
				}
				if field == "CapEff:" {
					threads++
				}
			}
			if threads < 3 {
				t.Errorf("saw %d threads only:\n%s", threads, said)
			}
		})
	}
}

func TestLiveIsBounded(t *testing.T) {
	l := NewLive(2)
	if !l.Enter() || !l.Enter() || l.Enter() {
		t.Fatal("want two connections to be let in, and no third")
	}
	l.Leave()
	if !l.Enter() || l.Count() != 2 {
		t.Errorf("want room for one after one has left; %d live", l.Count())
	}
	l.Leave()
	l.Leave()
}

func TestDrain(t *testing.T) {
	never := make(chan struct{})
	closed := make(chan struct{})
	close(closed)
	for _, tt := range []struct {
		name    string
		live    int
		timeout time.Duration
		cut     chan struct{}
		want    int
	}{
		{"nothing is open", 0, time.Hour, never, 0},
		{"it takes too long", 3, time.Millisecond, never, 3},
		{"cut short", 3, time.Hour, closed, 3},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := NewLive(10)
			for range tt.live {
				l.Enter()
			}
			got := l.Drain(tt.timeout, tt.cut, func() {
				for range tt.live {
					go l.Leave()
				}
			})
			if got != tt.want {
				t.Errorf("aborted %d, want %d", got, tt.want)
			}
		})
	}
	t.Run("they end by themselves", func(t *testing.T) {
		l := NewLive(10)
		l.Enter()
		go l.Leave()
		if got := l.Drain(time.Hour, never, func() { t.Error("aborted") }); got != 0 {
			t.Errorf("aborted %d, want none", got)
		}
	})
}

func TestConnectionLimit(t *testing.T) {
	fits, warning := ConnectionLimit(0)
	if fits < 1 || warning != "" {
		t.Errorf("%d, %q", fits, warning)
	}
	if got, warning := ConnectionLimit(fits + 1); got != fits || warning == "" {
		t.Errorf("asked for more than fits: %d, %q; want what fits and a warning", got, warning)
	}
	if got, warning := ConnectionLimit(1); got != 1 || warning != "" {
		t.Errorf("asked for 1: %d, %q", got, warning)
	}
}

func TestSignals(t *testing.T) {
	var now atomic.Int32
	again := make(chan struct{}, 2)
	ctx, stop := OnSignals(context.Background(), slog.New(slog.DiscardHandler), func() {
		now.Add(1)
		again <- struct{}{}
	})
	unix.Kill(os.Getpid(), unix.SIGTERM)
	<-ctx.Done()
	if now.Load() != 0 {
		t.Error("the first signal ended everything at once")
	}
	unix.Kill(os.Getpid(), unix.SIGINT)
	<-again
	stop()
}
