// SPDX-License-Identifier: Apache-2.0

package loop_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"runtime/pprof"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/proxy/loop"
	"golang.org/x/sys/unix"
)

// commands makes an echo that does something first, if the input is one of these.
func commands(do map[string]func(*loop.Conn)) loop.Handler {
	return func(c *loop.Conn) {
		b := c.Loop().Buffer()
		n, err := c.TryRecv(b)
		text := string(b[:n])
		c.Loop().Release(b)
		switch {
		case err == loop.ErrAgain:
			return
		case err != nil:
			c.Close()
			return
		}
		if f := do[text]; f != nil {
			f(c)
		}
		_, _ = c.Send([]byte(text))
	}
}

// TestPanicAndGoexit: only the connection of the handler that panics or exits is hurt, and its peer sees a reset.
func TestPanicAndGoexit(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 1})
	a := l.serve(commands(map[string]func(*loop.Conn){
		"panic":  func(*loop.Conn) { panic("boom") },
		"goexit": func(*loop.Conn) { runtime.Goexit() },
	}))
	good := dial(t, a)
	for i, what := range []string{"panic", "goexit", "goexit", "panic", "goexit"} {
		if err := ping(dial(t, a), what); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%s: %v, want ECONNRESET", what, err)
		}
		mustPing(t, good)
		if f := l.Figures(); f.Panics != uint64(i+1) || f.Conns != 1 {
			t.Errorf("after %s: %+v", what, f)
		}
	}
	if !l.log.has("boom") || !l.log.has("hazard_test.go") || !l.log.has("Goexit") {
		t.Error("the log does not tell of it, with the stack")
	}
}

// TestPanicOfPosted: what is posted may panic too.
func TestPanicOfPosted(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 1})
	a := l.serve(echo)
	l.run(func(l *loop.Loop) { l.Post(func() { panic("boom") }) })
	mustPing(t, dial(t, a))
	if err := l.Run(t.Context(), func(*loop.Loop) { panic("boom") }); err == nil {
		t.Error("Run of a function that panics: nil")
	}
}

// TestBlockedAndSpinningHandlers hold their own loop, no other, and for no longer than they do so.
func TestBlockedAndSpinningHandlers(t *testing.T) {
	for _, name := range []string{"blocks", "spins"} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, loop.Config{Loops: 2})
			var held, free atomic.Bool
			unblock := make(chan struct{})
			a := l.serve(commands(map[string]func(*loop.Conn){
				"blocks": func(*loop.Conn) { held.Store(true); <-unblock },
				"spins": func(*loop.Conn) {
					for held.Store(true); !free.Load(); {
					}
				},
			}))
			// The first and the third are of one loop.
			first, other, same := dial(t, a), dial(t, a), dial(t, a)
			for _, c := range []net.Conn{first, other, same} {
				mustPing(t, c)
			}
			if _, err := io.WriteString(first, name); err != nil {
				t.Fatal(err)
			}
			settle(t, "the handler holds its loop", held.Load)
			if _, err := io.WriteString(same, "late"); err != nil {
				t.Fatal(err)
			}
			for range 100 {
				mustPing(t, other)
			}
			if has(t, same) {
				t.Error("a connection of the loop that is held got an answer")
			}
			free.Store(true)
			close(unblock)
			for c, want := range map[net.Conn]string{first: name, same: "late"} {
				b := make([]byte, len(want))
				if _, err := io.ReadFull(c, b); err != nil || string(b) != want {
					t.Errorf("%q, %v; want %q", b, err, want)
				}
			}
		})
	}
}

// has reports whether there is something to be read.
func has(t *testing.T, c *net.TCPConn) (yes bool) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		yes = n > 0 && err == nil
	})
	return yes
}

// TestWaitingHandlers: others of the loop are served while a handler waits, in whatever way.
func TestWaitingHandlers(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 1})
	var waiting atomic.Bool
	release := make(chan struct{})
	a := l.serve(commands(map[string]func(*loop.Conn){
		"offload": func(c *loop.Conn) {
			c.Loop().Offload(func(context.Context) { waiting.Store(true); <-release })
		},
		"sleep": func(c *loop.Conn) {
			for waiting.Store(true); ; {
				select {
				case <-release:
					return
				default:
					_ = c.Loop().Sleep(time.Millisecond)
				}
			}
		},
		"recv": func(c *loop.Conn) {
			waiting.Store(true)
			_, _ = c.Recv(make([]byte, 1))
		},
	}))
	for _, how := range []string{"offload", "sleep", "recv"} {
		c, other := dial(t, a), dial(t, a)
		if _, err := io.WriteString(c, how); err != nil {
			t.Fatal(err)
		}
		settle(t, "the handler waits", waiting.Load)
		for range 10 {
			mustPing(t, other)
		}
		if has(t, c) {
			t.Errorf("%s: it does not wait", how)
		}
		if waiting.Store(false); how == "recv" {
			_, _ = io.WriteString(c, "x")
		} else {
			release <- struct{}{}
		}
		b := make([]byte, len(how))
		if _, err := io.ReadFull(c, b); err != nil || string(b) != how {
			t.Errorf("%q, %v; want %q", b, err, how)
		}
	}
}

// TestLockAcrossPark: the watchdog finds the handler that waits for a lock which a parked one holds.
func TestLockAcrossPark(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 1, Stall: 20 * time.Millisecond})
	var mu sync.Mutex
	var handlers atomic.Int32
	a := l.serve(func(c *loop.Conn) {
		handlers.Add(1)
		mu.Lock()
		_, _ = c.Recv(make([]byte, 1))
		_, _ = c.Recv(make([]byte, 1)) // parks with the lock, which it must not
		c.Close()
	})
	for i := range int32(2) {
		if _, err := io.WriteString(dial(t, a), "x"); err != nil {
			t.Fatal(err)
		}
		settle(t, "the handler runs", func() bool { return handlers.Load() == i+1 })
	}
	settle(t, "the watchdog tells where it is", func() bool {
		return l.Figures().Stalls > 0 && l.log.has("sync.(*Mutex).Lock") && l.log.has("TestLockAcrossPark")
	})
	mu.Unlock() // in the name of the first
}

// TestWatchdogRests: it stands still with the loops, and says nothing of one that only waits.
func TestWatchdogRests(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 1, Stall: 10 * time.Millisecond})
	a := l.serve(commands(map[string]func(*loop.Conn){"x": func(c *loop.Conn) { _ = c.Loop().Sleep(100 * time.Millisecond) }}))
	if err := ping(dial(t, a), "x"); err != nil {
		t.Fatal(err)
	}
	if n := l.Figures().Stalls; n != 0 {
		t.Errorf("%d stalls", n)
	}
}

// TestLockedThreadAcrossPark: it is as fatal as the package's documentation says.
func TestLockedThreadAcrossPark(t *testing.T) {
	if os.Getenv("PILLION_TEST_CRASH") == "" {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestLockedThreadAcrossPark$")
		cmd.Env = append(os.Environ(), "PILLION_TEST_CRASH=1")
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), "coro: OS thread locking must match") {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	l := newLab(t, loop.Config{Loops: 1})
	a := l.serve(commands(map[string]func(*loop.Conn){"x": func(c *loop.Conn) {
		runtime.LockOSThread()
		_ = c.Loop().Sleep(time.Millisecond)
	}}))
	_ = ping(dial(t, a), "x")
}

// TestLabelsOfAProfile: those that a handler sets are not those of the next that runs on its coroutine.
func TestLabelsOfAProfile(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 1})
	labels := func() string {
		var b bytes.Buffer
		_ = pprof.Lookup("goroutine").WriteTo(&b, 1)
		return b.String()
	}
	l.run(func(*loop.Loop) {
		pprof.SetGoroutineLabels(pprof.WithLabels(context.Background(), pprof.Labels("conn", "first")))
		if !strings.Contains(labels(), `"conn":"first"`) {
			t.Error("the label is not there")
		}
	})
	l.run(func(*loop.Loop) {
		if strings.Contains(labels(), `"conn":"first"`) {
			t.Error("the label is there yet")
		}
	})
}

// TestCoroutinesAndBuffersAreGivenBack soon after they are not needed any more.
func TestCoroutinesAndBuffersAreGivenBack(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 2})
	const many = 100
	var wait, done sync.WaitGroup
	wait.Add(many)
	done.Add(many)
	release := make(chan struct{})
	for range many {
		l.Go(func(l *loop.Loop) {
			defer done.Done()
			b := l.Buffer()
			b[0] = 1
			wait.Done()
			l.Offload(func(context.Context) { <-release })
			l.Release(b)
		})
	}
	wait.Wait()
	settle(t, "all hold a buffer", func() bool { f := l.Figures(); return f.Coroutines == many && f.Buffers == many })
	close(release)
	done.Wait()
	settle(t, "nothing is kept", func() bool {
		f := l.Figures()
		return f.Coroutines == 0 && f.Buffers == 0 && f.Free == 0 && f.Timers == 0
	})
}

// TestNoDescriptorsForAccept: the listener waits, without spinning, and goes on when there are some again.
func TestNoDescriptorsForAccept(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 2})
	var failures atomic.Int32
	a := netip.MustParseAddrPort(l.listen(func(c *loop.Conn) { c.Handle(echo) }, func(err error) {
		if !errors.Is(err, unix.EMFILE) {
			t.Errorf("failing: %v", err)
		}
		failures.Add(1)
	}))
	const clients = 20
	var fds []int
	for range clients {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Close(fd) }()
		fds = append(fds, fd)
	}
	_ = descriptors(t)
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	highest, err := unix.FcntlInt(0, unix.F_DUPFD_CLOEXEC, 0) // the lowest free descriptor
	if err != nil {
		t.Fatal(err)
	}
	_ = unix.Close(highest)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(highest + 5), Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Setrlimit(unix.RLIMIT_NOFILE, &was) }()
	for _, fd := range fds {
		if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}); err != nil {
			t.Fatal(err)
		}
	}
	settle(t, "it was tried in vain, and again", func() bool { return failures.Load() >= 3 })
	for _, fd := range fds { // those that were accepted first make room for those that were not
		if _, err := unix.Write(fd, []byte("x")); err != nil {
			t.Fatal(err)
		}
		if n, err := unix.Read(fd, make([]byte, 1)); n != 1 || err != nil {
			t.Fatalf("an answer of %d bytes, %v", n, err)
		}
		_ = unix.Shutdown(fd, unix.SHUT_RDWR)
	}
	if turns := l.Figures().Turns; turns > 1000 {
		t.Errorf("%d turns", turns)
	}
}

// TestHandlerIsToldThatItsConnectionIsGone while it waits for something else, and not of the mere end of the client's stream.
func TestHandlerIsToldThatItsConnectionIsGone(t *testing.T) {
	full := fullListener(t)
	waits := map[string]func(*loop.Loop) error{
		"sleep": func(l *loop.Loop) error { return l.Sleep(time.Hour) },
		"dial": func(l *loop.Loop) error {
			_, err := l.Dial(loop.Dial{Remote: full})
			return err
		},
		"offload": func(l *loop.Loop) (err error) {
			l.Offload(func(ctx context.Context) {
				<-ctx.Done()
				err = context.Cause(ctx)
			})
			return err
		},
	}
	for name, wait := range waits {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, loop.Config{Loops: 1})
			waiting, got := make(chan struct{}, 1), make(chan error, 2)
			a := l.listen(func(c *loop.Conn) {
				c.Start(func(c *loop.Conn) {
					waiting <- struct{}{}
					got <- wait(c.Loop())
					got <- wait(c.Loop()) // and so it stays
					c.Abort()
				})
			}, nil)
			c := dial(t, a)
			<-waiting
			_ = c.CloseWrite()
			other := dial(t, l.serve(echo))
			for range 5 {
				mustPing(t, other)
			}
			select {
			case err := <-got:
				t.Fatalf("told of an end: %v", err)
			default:
			}
			reset(c)
			for range 2 {
				if err := <-got; !errors.Is(err, loop.ErrGone) {
					t.Errorf("%v, want ErrGone", err)
				}
			}
		})
	}
}

// fullListener is an address whose SYNs are not answered: its queue is full.
func fullListener(t *testing.T) netip.AddrPort {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		c, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Close(c) })
		_ = unix.Connect(c, sa)
	}
	return loop.AddrPort(sa)
}
