// SPDX-License-Identifier: Apache-2.0

package loop_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/proxy/loop"
	"golang.org/x/sys/unix"
)

// TestBackPressure: who does not read is not read from, one buffer is held for it at most, and nothing is lost.
func TestBackPressure(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 2})
	a := l.serve(func(c *loop.Conn) {
		b := c.Loop().Buffer()
		n, err := c.TryRecv(b)
		if err != nil {
			c.Loop().Release(b)
			if err != loop.ErrAgain {
				c.Close()
			}
			return
		}
		_, _ = c.SendBuffer(b, n, false)
	})
	const streams = 8
	data := content(16 << 20)
	done := make(chan error, streams)
	for range streams {
		c := dial(t, a)
		stalled := make(chan struct{})
		go func() {
			_, err := c.Write(data[:8<<20])
			close(stalled)
			_, err2 := c.Write(data[8<<20:])
			done <- errors.Join(err, err2, c.CloseWrite())
		}()
		t.Cleanup(func() {
			got, err := io.ReadAll(c)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes and %v, want %d", len(got), err, len(data))
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
	settle(t, "handlers wait", func() bool { f := l.Figures(); return f.Coroutines >= streams })
	if f := l.Figures(); f.Buffers > streams+2 {
		t.Errorf("%d buffers are held for %d streams", f.Buffers, streams)
	}
}

// TestDeadline: of a wait for input and for room, and of an idle connection; once, and not after it was put off or taken away.
func TestDeadline(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 1})
	soon := func(c *loop.Conn) { c.SetDeadline(c.Loop().Now().Add(20 * time.Millisecond)) }
	results := make(chan error, 1)
	idle := false // of the loop
	a := l.listen(func(c *loop.Conn) {
		c.Start(func(c *loop.Conn) {
			if idle {
				_, err := c.TryRecv(make([]byte, 1))
				if err == loop.ErrAgain {
					return
				}
				results <- err
				c.Close()
				return
			}
			soon(c)
			_, err := c.Recv(make([]byte, 1))
			results <- err
			c.SetDeadline(0)
			soon(c)
			c.SetDeadline(0)
			soon(c)
			_, err = c.Send(content(32 << 20))
			results <- err
			soon(c)
			c.SetDeadline(0)
			if err := c.Loop().Sleep(50 * time.Millisecond); err != nil {
				t.Error(err)
			}
			_, err = c.TryRecv(make([]byte, 1))
			results <- err
			soon(c)
			idle = true
		})
	}, nil)
	dial(t, a)
	for _, want := range []error{loop.ErrTimeout, loop.ErrTimeout, loop.ErrAgain, loop.ErrTimeout} {
		if err := <-results; !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
	}
}

// TestDialErrors are the system's, by the call's name, and a timeout.
func TestDialErrors(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 1})
	full := fullListener(t)
	closed := netip.MustParseAddrPort(l.serve(echo))
	for name, c := range map[string]struct {
		dial loop.Dial
		want error
	}{
		"refused":       {loop.Dial{Remote: netip.AddrPortFrom(closed.Addr(), 1)}, unix.ECONNREFUSED},
		"not ours":      {loop.Dial{Remote: closed, Local: netip.MustParseAddrPort("192.0.2.1:0")}, unix.EADDRNOTAVAIL},
		"no address":    {loop.Dial{Remote: closed, Local: netip.AddrPortFrom(netip.Addr{}, 20000)}, unix.EINVAL},
		"other family":  {loop.Dial{Remote: closed, Local: netip.MustParseAddrPort("[::1]:0")}, unix.EAFNOSUPPORT},
		"timeout":       {loop.Dial{Remote: full, Until: 1}, loop.ErrTimeout},
		"option":        {loop.Dial{Remote: closed, Bound: func(int) error { return unix.EPERM }}, unix.EPERM},
		"from its peer": {loop.Dial{Remote: closed, Local: closed}, unix.EADDRINUSE},
	} {
		t.Run(name, func(t *testing.T) {
			l.run(func(l *loop.Loop) {
				conn, err := l.Dial(c.dial)
				if !errors.Is(err, c.want) {
					t.Errorf("%v, want %v", err, c.want)
				}
				if conn != nil {
					conn.Abort()
				}
			})
		})
	}
	if n := l.Figures().Conns; n != 0 {
		t.Errorf("%d connections", n)
	}
}

// TestAbort: whatever is done with a connection fails with the cause, its handler is told, and so is that of one that comes later.
func TestAbort(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 2})
	cause := errors.New("no more")
	got := make(chan error, 100)
	recv := func(c *loop.Conn) {
		if _, err := c.TryRecv(make([]byte, 1)); err != loop.ErrAgain {
			got <- err
		}
	}
	a := l.listen(func(c *loop.Conn) {
		c.Start(func(c *loop.Conn) {
			var b [1]byte
			if _, err := c.Recv(b[:]); err != nil {
				t.Error(err)
			}
			_, _ = c.Send(b[:])
			switch b[0] {
			case 'i':
				c.Handle(recv)
			case 'r':
				_, err := c.Recv(b[:])
				got <- err
			case 's':
				_, err := c.Send(content(32 << 20))
				got <- err
			case 'z':
				got <- c.Loop().Sleep(time.Hour)
			}
		})
	}, nil)
	const kinds = "irsz"
	for _, kind := range kinds {
		if err := ping(dial(t, a), string(kind)); err != nil {
			t.Fatal(err)
		}
	}
	l.Abort(cause)
	for range kinds {
		if err := <-got; !errors.Is(err, cause) {
			t.Errorf("%v, want %v", err, cause)
		}
	}
	late, err := net.Dial("tcp", a)
	if err == nil { // else it was reset before it knew that it was connected
		_, err = late.Read(make([]byte, 1))
		_ = late.Close()
	}
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("a late one: %v", err)
	}
	l.run(func(l *loop.Loop) {
		if _, err := l.Dial(loop.Dial{Remote: netip.MustParseAddrPort(a)}); !errors.Is(err, cause) {
			t.Errorf("a late dial: %v", err)
		}
	})
}

// TestRunIsInterrupted: what it waits for fails with the cause of its context, and the next that its coroutine runs does not.
func TestRunIsInterrupted(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 1})
	cause := errors.New("enough")
	for range 3 {
		ctx, cancel := context.WithCancelCause(t.Context())
		err := l.Run(ctx, func(l *loop.Loop) {
			cancel(cause)
			for range 2 {
				if err := l.Sleep(time.Hour); !errors.Is(err, cause) {
					t.Errorf("%v, want %v", err, cause)
				}
			}
		})
		if err != nil {
			t.Error(err)
		}
	}
	l.run(func(l *loop.Loop) {
		if err := l.Sleep(time.Millisecond); err != nil {
			t.Error(err)
		}
	})
}

// TestAfterClose: a group that is closed takes nothing more.
func TestAfterClose(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 2})
	started := make(chan struct{})
	ended := make(chan error, 1)
	l.Go(func(l *loop.Loop) {
		close(started)
		ended <- l.Sleep(time.Hour)
	})
	<-started
	l.Close()
	l.Close()
	if err := <-ended; err == nil {
		t.Error("it slept on")
	}
	if l.Go(func(*loop.Loop) { t.Error("it runs") }) {
		t.Error("Go: true")
	}
	if err := l.Run(t.Context(), func(*loop.Loop) { t.Error("it runs") }); err == nil {
		t.Error("Run: nil")
	}
	l.Abort(nil)
}

// TestLoopsShareConnections evenly.
func TestLoopsShareConnections(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 4})
	counts := make(chan *loop.Loop, 100)
	a := l.listen(func(c *loop.Conn) { counts <- c.Loop() }, nil)
	for range 40 {
		dial(t, a)
	}
	of := map[*loop.Loop]int{}
	for range 40 {
		of[<-counts]++
	}
	for loop, n := range of {
		if n != 10 {
			t.Errorf("loop %p has %d of 40", loop, n)
		}
	}
}
