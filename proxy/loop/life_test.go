// SPDX-License-Identifier: Apache-2.0

package loop_test

import (
	"errors"
	"net"
	"net/netip"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/proxy/loop"
	"golang.org/x/sys/unix"
)

// TestNothingIsAcceptedAfterClose: what was handed over to a loop that is busy is taken over before Close returns.
func TestNothingIsAcceptedAfterClose(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 2})
	var accepted atomic.Int32
	var other atomic.Pointer[loop.Loop]
	tcp := listenTCP(t)
	s, err := l.Serve(tcp, func(c *loop.Conn, _ netip.AddrPort) {
		accepted.Add(1)
		other.Store(c.Loop())
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	address := tcp.Addr().String()
	for range 2 { // one for each loop, the other's last
		dial(t, address)
	}
	settle(t, "both are accepted", func() bool { return accepted.Load() == 2 })
	busy, free := make(chan struct{}), make(chan struct{})
	other.Load().Post(func() {
		close(busy)
		<-free
	})
	<-busy
	for range 2 {
		dial(t, address)
	}
	settle(t, "one waits for the loop that is busy", func() bool { return l.Figures().Conns == 4 && accepted.Load() == 3 })
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		s.Close()
	}()
	settle(t, "nobody listens any more", func() bool {
		c, err := net.Dial("tcp", address)
		if err == nil {
			_ = c.Close()
		}
		return err != nil
	})
	select {
	case <-closed:
		t.Error("Close returned, and one was not accepted yet")
	case <-time.After(20 * time.Millisecond): // a Close that does not wait may need longer; it is missed then, and nothing else
	}
	close(free)
	if <-closed; accepted.Load() < 4 { // or more: those that found out whether anybody listens
		t.Errorf("%d of 4 were accepted when Close returned", accepted.Load())
	}
}

// TestAcceptedThatPanicsOrExits: its connection is reset, those behind it are not lost.
func TestAcceptedThatPanicsOrExits(t *testing.T) {
	for name, bad := range map[string]func(){"panics": func() { panic("boom") }, "exits": runtime.Goexit} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, loop.Config{Loops: 2})
			var accepted atomic.Int32
			a := l.listen(func(c *loop.Conn) {
				if accepted.Add(1)%2 == 1 {
					bad()
				}
				c.Handle(echo)
			}, nil)
			const pairs = 20
			resets := make(chan bool)
			for range 2 * pairs {
				go func() {
					c, err := net.Dial("tcp", a)
					if err == nil {
						err = ping(c, "hello")
						_ = c.Close()
					}
					if err != nil && !errors.Is(err, unix.ECONNRESET) {
						t.Error(err)
					}
					resets <- err != nil
				}()
			}
			n := 0
			for range 2 * pairs {
				if <-resets {
					n++
				}
			}
			if n != pairs {
				t.Errorf("%d of %d were reset, want half", n, 2*pairs)
			}
		})
	}
}

// TestGoexitOfPosted: what was posted behind it is called.
func TestGoexitOfPosted(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 1})
	var on *loop.Loop
	l.run(func(l *loop.Loop) { on = l })
	called := make(chan bool, 2)
	on.Do(func() { // so that they come at once
		on.Post(runtime.Goexit)
		on.Post(func() { called <- true })
		on.Post(func() { called <- true })
	})
	<-called
	<-called
}

// TestStartedWhileClosing: it does not wait for anything, on whatever coroutine it runs.
func TestStartedWhileClosing(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 1})
	waited := make(chan error, 100)
	done := make(chan struct{})
	l.Go(func(on *loop.Loop) {
		defer close(done)
		for on.Sleep(time.Hour) == nil { // until it is told of the end
		}
		for range 20 { // more than there are free coroutines
			on.Go(func(on *loop.Loop) { waited <- on.Sleep(time.Hour) })
		}
	})
	l.Close()
	<-done
	for range 20 {
		if err := <-waited; !errors.Is(err, net.ErrClosed) {
			t.Errorf("%v, want %v", err, net.ErrClosed)
		}
	}
}

// TestListenerThatWasLeftOpen ends with its group.
func TestListenerThatWasLeftOpen(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 2}) // which counts the descriptors
	tcp := listenTCP(t)
	address := tcp.Addr().String()
	s, err := l.Serve(tcp, func(*loop.Conn, netip.AddrPort) {}, nil)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if c, err := net.Dial("tcp", address); err == nil {
		_ = c.Close()
		t.Error("it listens yet")
	}
	s.Close() // once more is harmless
}

// TestHandlerThatIsReplaced while another runs: taken away, it is not called; started, it is called when that has returned.
func TestHandlerThatIsReplaced(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 1})
	started := make(chan struct{}, 1)
	conns := make(chan *loop.Conn, 1)
	a := l.listen(func(c *loop.Conn) { conns <- c }, nil)
	dial(t, a)
	c := <-conns
	c.Loop().Do(func() {
		c.Start(func(*loop.Conn) { t.Error("it was taken away") })
		c.Handle(nil)
	})
	l.run(func(*loop.Loop) {
		c.Start(func(c *loop.Conn) {
			c.Start(func(c *loop.Conn) {
				started <- struct{}{}
				c.Abort()
			})
		})
	})
	<-started
	if f := l.Figures(); f.Panics != 0 {
		t.Errorf("%+v", f)
	}
}
