// SPDX-License-Identifier: Apache-2.0

package loop_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/proxy/loop"
	"golang.org/x/sys/unix"
)

// TestEndIsToldOnce: by the FIN, and not again by the HUP that follows when we have ended our stream too.
func TestEndIsToldOnce(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 1})
	answer := content(9 << 20)
	var ends atomic.Int32
	a := l.serve(func(c *loop.Conn) {
		b := make([]byte, 100)
		if _, err := c.TryRecv(b); err == io.EOF {
			ends.Add(1)
			_, _ = c.Send(answer)
			_ = c.CloseWrite()
			// It stays open, so that the kernel has a HUP to report.
		}
	})
	c := dial(t, a)
	_, _ = io.WriteString(c, "request")
	_ = c.CloseWrite()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, answer) {
		t.Errorf("%d bytes and %v, want %d", len(got), err, len(answer))
	}
	for range 10 { // turns of the loop
		mustPing(t, dial(t, l.serve(echo)))
	}
	if n := ends.Load(); n != 1 {
		t.Errorf("%d ends", n)
	}
}

// TestRecvOfExactlyTheBuffer: a recv that fills its buffer leaves nobody asleep on what is left.
func TestRecvOfExactlyTheBuffer(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 1})
	a := l.serve(func(c *loop.Conn) {
		var b [10]byte
		n, err := c.TryRecv(b[:])
		if err == io.EOF {
			c.Close()
		} else if err == nil {
			_, _ = c.Send(b[:n])
		}
	})
	c := dial(t, a)
	for _, size := range []int{10, 20, 1000, 9, 11} {
		if err := ping(c, strings.Repeat("x", size)); err != nil {
			t.Fatal(size, err)
		}
	}
}

// TestInputLeftIsReadInTurn: a handler that leaves input gets the loop again after the others.
func TestInputLeftIsReadInTurn(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 1})
	const size = 1 << 20
	var reads atomic.Int32
	slow := l.serve(func(c *loop.Conn) {
		var b [1]byte
		if _, err := c.TryRecv(b[:]); err == nil {
			reads.Add(1)
		} else if err != loop.ErrAgain {
			c.Close()
		}
	})
	other := dial(t, l.serve(echo))
	c := dial(t, slow)
	go func() { _, _ = c.Write(make([]byte, size)) }()
	settle(t, "it is being read", func() bool { return reads.Load() > 0 })
	mustPing(t, other)
	if n := reads.Load(); n >= size {
		t.Error("the other was served after everything was read")
	}
	settle(t, "all is read", func() bool { return reads.Load() == size })
}

// TestDuplicateOutlivesClose: a duplicate of the descriptor keeps the socket in epoll; it costs a turn for each thing that comes.
func TestDuplicateOutlivesClose(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 1})
	duplicates := make(chan int, 1)
	a := l.serve(commands(map[string]func(*loop.Conn){"x": func(c *loop.Conn) {
		_ = c.Control(func(fd int) error {
			d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
			duplicates <- d
			return err
		})
		c.Close()
	}}))
	c, other := dial(t, a), dial(t, a)
	_, _ = io.WriteString(c, "x")
	d := <-duplicates
	defer func() { _ = unix.Close(d) }()
	_, _ = io.WriteString(c, "more")
	mustPing(t, other)
	before := l.Figures().Turns
	for range 20 {
		mustPing(t, other)
	}
	if n := l.Figures().Turns - before; n > 100 {
		t.Errorf("%d turns for 20 exchanges", n)
	}
}

// TestLinger: it is 0 while a connection lives, since close(2) would wait with any other; and off when it is closed, so that all
// arrives.
func TestLinger(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 1})
	data := content(4 << 20)
	linger := func(c *loop.Conn) (o *unix.Linger) {
		_ = c.Control(func(fd int) (err error) {
			o, err = unix.GetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER)
			return err
		})
		return o
	}
	a := l.serve(commands(map[string]func(*loop.Conn){"x": func(c *loop.Conn) {
		if o := linger(c); o.Onoff != 1 || o.Linger != 0 {
			t.Errorf("accepted: %+v", o)
		}
		_, _ = c.Send(data)
		c.Close()
	}}))
	c := dial(t, a)
	_, _ = io.WriteString(c, "x")
	if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes and %v, want %d", len(got), err, len(data))
	}
	l.run(func(l *loop.Loop) {
		c, err := l.Dial(loop.Dial{Remote: netip.MustParseAddrPort(a)})
		if err != nil {
			t.Fatal(err)
		}
		if o := linger(c); o.Onoff != 1 || o.Linger != 0 {
			t.Errorf("dialled: %+v", o)
		}
		c.Abort()
	})
}

// TestUrgentDataStopsSplice: what splice leaves is received, and no byte is lost, nor its urgency.
func TestUrgentDataStopsSplice(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 1})
	sink := dialSink(t, l)
	var got, urgent atomic.Int32
	a := l.serve(func(c *loop.Conn) {
		to := sink(c.Loop())
		for {
			n, srcErr, err := loop.Splice(to, c, 1<<20)
			got.Add(int32(n))
			if srcErr != nil || err != nil {
				t.Errorf("splice: %v, %v", srcErr, err)
				return
			}
			var b [1]byte
			n, err = c.TryRecv(b[:])
			if err == loop.ErrAgain {
				return
			}
			if err != nil {
				c.Close()
				return
			}
			got.Add(int32(n))
			if c.Urgent() {
				urgent.Add(1)
			}
		}
	})
	c := dial(t, a)
	_, _ = c.Write(make([]byte, 1000))
	settle(t, "the first part has passed", func() bool { return got.Load() == 1000 })
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) { err = unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil) })
	if err != nil {
		t.Fatal(err)
	}
	_, _ = c.Write(make([]byte, 2000))
	settle(t, "everything has passed", func() bool { return got.Load() == 3001 })
	if urgent.Load() != 1 {
		t.Errorf("%d urgent bytes", urgent.Load())
	}
}

// dialSink makes a connection to somebody who reads everything, when it is first asked for.
func dialSink(t *testing.T, l *lab) func(*loop.Loop) *loop.Conn {
	t.Helper()
	a := l.serve(func(c *loop.Conn) {
		b := c.Loop().Buffer()
		defer c.Loop().Release(b)
		if _, err := c.TryRecv(b); err != nil && err != loop.ErrAgain {
			c.Close()
		}
	})
	var to *loop.Conn
	return func(l *loop.Loop) *loop.Conn {
		if to == nil {
			var err error
			if to, err = l.Dial(loop.Dial{Remote: netip.MustParseAddrPort(a)}); err != nil {
				t.Fatal(err)
			}
		}
		return to
	}
}

// TestPipesAreBounded: what gets none is told so, and pipes are gone when they are not needed any more.
func TestPipesAreBounded(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 1, Pipes: 1})
	data := content(32 << 20)
	stuck := dial(t, l.serve(commands(nil))) // something to splice from
	var peer atomic.Pointer[loop.Conn]       // takes nothing
	never := l.listen(func(c *loop.Conn) { peer.Store(c) }, func(error) {})
	var none atomic.Bool
	a := l.serve(func(c *loop.Conn) {
		to, err := c.Loop().Dial(loop.Dial{Remote: netip.MustParseAddrPort(never)})
		if err != nil {
			t.Error(err)
			return
		}
		defer to.Abort()
		defer c.Abort()
		for {
			_, srcErr, dstErr := loop.Splice(to, c, 1<<30)
			if srcErr == loop.ErrNoPipe {
				none.Store(true)
				return
			}
			if srcErr != nil || dstErr != nil {
				return
			}
			if err := c.WaitInput(); err != nil {
				return
			}
		}
	})
	for range 2 {
		c := dial(t, a)
		go func() { _, _ = c.Write(data) }()
		if !none.Load() {
			settle(t, "there is a pipe, or none", func() bool { return l.Figures().Pipes == 1 || none.Load() })
		}
	}
	settle(t, "the second has none", none.Load)
	mustPing(t, stuck)
	l.Abort(errors.New("the end"))
	settle(t, "the pipe is closed", func() bool { return l.Figures().Pipes == 0 })
}

// TestResetThatASendWasToldOfIsNoEnd: the kernel tells of a reset once. When a send has been told, a recv returns 0, as it does at
// the end of a stream; were that taken for one, a cut stream would pass for a whole one.
func TestResetThatASendWasToldOfIsNoEnd(t *testing.T) {
	sends := map[string]func(c, from *loop.Conn) error{
		"Send": func(c, _ *loop.Conn) error {
			_, err := c.Send([]byte("x"))
			return err
		},
		"SendBuffer": func(c, _ *loop.Conn) error {
			_, err := c.SendBuffer(c.Loop().Buffer(), 1, false)
			return err
		},
		"Splice": func(c, from *loop.Conn) error {
			_, srcErr, dstErr := loop.Splice(c, from, 1<<20)
			if srcErr != nil {
				t.Errorf("the source: %v", srcErr)
			}
			return dstErr
		},
	}
	for name, send := range sends {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, loop.Config{Loops: 1})
			conns := make(chan *loop.Conn, 2)
			a := l.listen(func(c *loop.Conn) { conns <- c }, nil)
			far, source := dial(t, a), dial(t, a)
			c, from := <-conns, <-conns
			_, _ = io.WriteString(source, "x")
			l.run(func(*loop.Loop) {
				for !from.Readable() {
					_ = from.WaitInput()
				}
				reset(far) // after which the loop does not look at events until we are done
				if err := send(c, from); !errors.Is(err, unix.ECONNRESET) {
					t.Fatalf("the send: %v; want ECONNRESET", err)
				}
				_, err := c.Recv(make([]byte, 1))
				if !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("Recv: %v; want ECONNRESET", err)
				}
			})
		})
	}
}

// TestResetThatComesWithTheEnd: one poll sees both, and nothing will be announced again; the end is told, and then the reset.
func TestResetThatComesWithTheEnd(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 1})
	told := make(chan error, 3)
	a := l.serve(func(c *loop.Conn) {
		for {
			_, err := c.TryRecv(make([]byte, 10))
			if err == loop.ErrAgain {
				return
			}
			told <- err
			if err != nil && err != io.EOF {
				c.Abort()
				return
			}
		}
	})
	c := dial(t, a)
	settle(t, "it is accepted", func() bool { return l.Figures().Conns == 1 })
	l.run(func(*loop.Loop) {
		_, _ = io.WriteString(c, "bye")
		_ = c.CloseWrite()
		reset(c)
	})
	for _, want := range []error{nil, io.EOF, unix.EPIPE} {
		if err := <-told; !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
	}
}

// TestFailureIsToldAgain: whoever asks once more neither waits for ever nor is told of a clean end.
func TestFailureIsToldAgain(t *testing.T) {
	for _, first := range []string{"Recv", "Failure"} {
		t.Run(first, func(t *testing.T) {
			l := newLab(t, loop.Config{Loops: 1})
			conns := make(chan *loop.Conn, 1)
			a := l.listen(func(c *loop.Conn) { conns <- c }, nil)
			far := dial(t, a)
			c := <-conns
			reset(far)
			l.run(func(l *loop.Loop) {
				if err := c.WaitInput(); err != nil {
					t.Error(err)
				}
				if first == "Failure" {
					if err := c.Failure(); !errors.Is(err, unix.ECONNRESET) {
						t.Errorf("Failure: %v", err)
					}
				}
				for range 3 {
					if _, err := c.Recv(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
						t.Errorf("Recv: %v", err)
					}
				}
			})
		})
	}
}

// TestTwoUrgentBytes: each is received alone, as urgent, also if the second comes after the first was announced.
func TestTwoUrgentBytes(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 1})
	conns := make(chan *loop.Conn, 1)
	a := l.listen(func(c *loop.Conn) { conns <- c }, nil)
	far := dial(t, a)
	c := <-conns
	raw, err := far.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	urgent := func() {
		_ = raw.Control(func(fd uintptr) {
			if err := unix.Sendto(int(fd), []byte("!"), unix.MSG_OOB, nil); err != nil {
				t.Error(err)
			}
		})
	}
	urgent()
	l.run(func(*loop.Loop) {
		for i := range 2 {
			if n, err := c.Recv(make([]byte, 10)); n != 1 || err != nil || !c.Urgent() {
				t.Errorf("byte %d: %d, %v, urgent %v", i, n, err, c.Urgent())
			}
			if i == 0 {
				urgent() // before the loop looks at events again
			}
		}
	})
}

// TestEventOfAConnectionThatIsGone: it was closed in the same turn, and others have its place, or nobody.
func TestEventOfAConnectionThatIsGone(t *testing.T) {
	for _, left := range []int{0, 1} {
		l := newLab(t, loop.Config{Loops: 1})
		conns := make(chan *loop.Conn, 10)
		a := l.listen(func(c *loop.Conn) { conns <- c }, nil)
		var far []*net.TCPConn
		var near []*loop.Conn
		for range 3 {
			far = append(far, dial(t, a))
			near = append(near, <-conns)
		}
		to := netip.MustParseAddrPort(l.serve(echo))
		replaced := make(chan error, 1)
		near[0].Loop().Do(func() {
			on := near[0].Loop()
			on.Post(func() { // before the events of what comes now
				for _, c := range near[left:] {
					c.Abort()
				}
				on.Go(func(*loop.Loop) {
					c, err := on.Dial(loop.Dial{Remote: to})
					if err == nil {
						_, err = c.Send([]byte("x"))
					}
					if err == nil {
						_, err = c.Recv(make([]byte, 1))
						c.Close()
					}
					replaced <- err
				})
			})
			for _, c := range far {
				_, _ = io.WriteString(c, "x")
			}
		})
		if err := <-replaced; err != nil {
			t.Error(err)
		}
	}
}

// TestSignalAtTheUrgentByte: a recv at the urgent byte says that there is nothing while a signal is pending. Who then waits for input
// waits for ever: the input has come.
func TestSignalAtTheUrgentByte(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 1})
	received := make(chan bool, 1)
	a := l.serve(func(c *loop.Conn) {
		n, err := c.TryRecv(make([]byte, 10))
		if n > 0 {
			received <- true
		} else if err != loop.ErrAgain {
			c.Close()
		}
	})
	far := dial(t, a)
	raw, err := far.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var stop atomic.Bool
	var signals sync.WaitGroup
	signals.Go(func() {
		for !stop.Load() {
			threads, _ := os.ReadDir("/proc/self/task")
			for _, thread := range threads {
				tid, _ := strconv.Atoi(thread.Name())
				for range 50 {
					_ = unix.Tgkill(unix.Getpid(), tid, unix.SIGURG) // as the scheduler does; the thread may be gone
				}
			}
		}
	})
	defer signals.Wait()
	defer stop.Store(true)
	for round := range 500 {
		var serr error
		if err := raw.Write(func(fd uintptr) bool {
			_, serr = unix.SendmsgN(int(fd), []byte{'!'}, nil, nil, unix.MSG_OOB)
			return true
		}); err != nil || serr != nil {
			t.Fatal(err, serr)
		}
		select {
		case <-received:
		case <-time.After(30 * time.Second):
			t.Fatalf("round %d: the urgent byte is there and nobody reads it", round)
		}
	}
}
