// SPDX-License-Identifier: Apache-2.0

package tcp_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/proxy/loop"
	"github.com/pillionproxy/pillion/proxy/tcp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// lab is a relay between two connections: client and server are their far ends.
type lab struct {
	t              *testing.T
	loops          *loop.Group
	client, server *net.TCPConn
	near           [2]*loop.Conn // the relay's ends, indexed by tcp.Side
	sent, received atomic.Uint64
	ended          chan struct{}
	err            error // of Relay, once ended is closed
}

func newLab(t *testing.T) *lab {
	t.Helper()
	return newLabWith(t, loop.Config{Loops: 1}, 0)
}

func newLabWith(t *testing.T, cfg loop.Config, idle time.Duration) *lab {
	t.Helper()
	g, err := loop.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{t: t, loops: g, ended: make(chan struct{})}
	var nearClient, nearServer *net.TCPConn
	l.client, nearClient = pair(t)
	l.server, nearServer = pair(t)
	if err := g.Run(t.Context(), func(on *loop.Loop) {
		for side, c := range []*net.TCPConn{nearClient, nearServer} {
			var err error
			if l.near[side], err = on.Adopt(c); err != nil {
				t.Error(err)
			}
		}
		l.near[tcp.Client].Start(func(c *loop.Conn) {
			tcp.Relay(c, l.near[tcp.Upstream], tcp.Options{Sent: &l.sent, Received: &l.received, Idle: idle, Done: func(err error) {
				l.err = err
				close(l.ended)
			}})
		})
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.client.Close()
		l.server.Close()
		<-l.ended
		g.Close()
		if f := g.Figures(); f.Conns+f.Coroutines+f.Buffers+f.Pipes+f.Timers > 0 || f.Panics > 0 {
			t.Errorf("left, or worse: %+v", f)
		}
	})
	return l
}

// pair is a connection over loopback: a plain far end, and the end that a proxy would hold.
func pair(t *testing.T) (far, near *net.TCPConn) {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var d net.Dialer
	d.SetMultipathTCP(false)
	c, err := d.DialContext(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	a, err := l.(*net.TCPListener).AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn), a
}

func control(t *testing.T, c *net.TCPConn, f func(fd int) error) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var ferr error
	if err := errors.Join(raw.Control(func(fd uintptr) { ferr = f(int(fd)) }), ferr); err != nil {
		t.Fatal(err)
	}
}

// wait waits for the relay's end.
func (l *lab) wait() error {
	l.t.Helper()
	select {
	case <-l.ended:
		return l.err
	case <-time.After(20 * time.Second):
		l.t.Fatal("the relay does not end")
		return nil
	}
}

func (l *lab) write(c *net.TCPConn, data string) {
	l.t.Helper()
	if _, err := io.WriteString(c, data); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lab) read(c *net.TCPConn, want string) {
	l.t.Helper()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
		l.t.Fatalf("got %q, %v; want %q", got, err, want)
	}
}

func reset(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}

// wantReset reads to the end, which must be a reset.
func wantReset(t *testing.T, c *net.TCPConn) {
	t.Helper()
	if n, err := io.Copy(io.Discard, c); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("got %d bytes, then %v; want a reset", n, err)
	}
}

func TestBothStreamsEndByThemselves(t *testing.T) {
	const size = 9 << 20
	up, down := make([]byte, size), make([]byte, size)
	rand.Read(up)
	rand.Read(down)
	for _, first := range []string{"client", "server"} {
		t.Run(first+" ends first, the other answers afterwards", func(t *testing.T) {
			l := newLab(t)
			one, other, a, b := l.client, l.server, up, down
			if first == "server" {
				one, other = other, one
			}
			go func() {
				one.Write(a)
				one.CloseWrite()
			}()
			got, err := io.ReadAll(other)
			if err != nil || !bytes.Equal(got, a) {
				t.Fatalf("%d bytes of %d, %v", len(got), len(a), err)
			}
			go func() {
				other.Write(b)
				other.Close()
			}()
			got, err = io.ReadAll(one)
			if err != nil || !bytes.Equal(got, b) {
				t.Fatalf("%d bytes of %d, %v", len(got), len(b), err)
			}
			if err := l.wait(); err != nil {
				t.Errorf("Relay: %v", err)
			}
			if l.sent.Load() != size || l.received.Load() != size {
				t.Errorf("counted %d and %d bytes, want %d each", l.sent.Load(), l.received.Load(), size)
			}
		})
	}
}

func TestResetIsPassedOn(t *testing.T) {
	sides := func(l *lab) map[tcp.Side]*net.TCPConn {
		return map[tcp.Side]*net.TCPConn{tcp.Client: l.client, tcp.Upstream: l.server}
	}
	before := map[string]func(*lab, *net.TCPConn, *net.TCPConn){
		"idle": func(*lab, *net.TCPConn, *net.TCPConn) {},
		"after data": func(l *lab, from, to *net.TCPConn) {
			l.write(from, "hello")
			l.read(to, "hello")
		},
		"after its own end": func(l *lab, from, to *net.TCPConn) {
			from.CloseWrite()
			if _, err := io.ReadAll(to); err != nil {
				l.t.Fatal(err)
			}
		},
		"after the other's end": func(l *lab, from, to *net.TCPConn) {
			to.CloseWrite()
			if _, err := io.ReadAll(from); err != nil {
				l.t.Fatal(err)
			}
		},
		"while the other does not read": func(l *lab, from, to *net.TCPConn) { l.fill(from) },
	}
	for name, prepare := range before {
		for _, side := range []tcp.Side{tcp.Client, tcp.Upstream} {
			t.Run(side.String()+" "+name, func(t *testing.T) {
				l := newLab(t)
				from, to := sides(l)[side], sides(l)[1-side]
				prepare(l, from, to)
				reset(from)
				err := l.wait()
				e, ok := errors.AsType[*tcp.Error](err)
				if !ok || e.Side != side {
					t.Errorf("Relay: %v; want an error of the %s", err, side)
				}
				if name == "after its own end" { // reading says no more than that the stream has ended
					if _, err := to.Write([]byte("x")); !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
						t.Errorf("write: %v; want that the connection is reset", err)
					}
					return
				}
				wantReset(t, to)
			})
		}
	}
}

// fill writes until nothing more goes: what the far end does not read is in the kernel's buffers and in one of the relay's.
func (l *lab) fill(c *net.TCPConn) (total int) {
	l.t.Helper()
	chunk := make([]byte, 256<<10)
	for quiet := 0; quiet < 5; {
		c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
		n, err := c.Write(chunk)
		total += n
		switch {
		case err == nil || n > 0:
			quiet = 0
		case errors.Is(err, errTimeout(err)):
			quiet++
		default:
			l.t.Fatal(err)
		}
	}
	c.SetWriteDeadline(time.Time{})
	return total
}

// errTimeout is err itself if it is a timeout, else nil.
func errTimeout(err error) error {
	if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
		return err
	}
	return nil
}

func TestBackPressure(t *testing.T) {
	for _, slow := range []tcp.Side{tcp.Client, tcp.Upstream} {
		t.Run(slow.String()+" does not read", func(t *testing.T) {
			l := newLab(t)
			writer, reader, passed := l.server, l.client, &l.received
			if slow == tcp.Upstream {
				writer, reader, passed = l.client, l.server, &l.sent
			}
			total := l.fill(writer)
			if most := 64 << 20; total > most {
				t.Errorf("%d bytes were taken of a writer whose reader does not read; want less than %d", total, most)
			}
			writer.CloseWrite()
			got, err := io.Copy(io.Discard, reader)
			if err != nil || got != int64(total) {
				t.Errorf("then %d bytes arrived, %v; want %d", got, err, total)
			}
			reader.Close()
			if err := l.wait(); err != nil {
				t.Errorf("Relay: %v", err)
			}
			if passed.Load() != uint64(total) {
				t.Errorf("counted %d bytes, want %d", passed.Load(), total)
			}
		})
	}
}

func TestUrgentDataStaysUrgent(t *testing.T) {
	l := newLab(t)
	l.write(l.client, "abc")
	l.read(l.server, "abc")
	control(t, l.client, func(fd int) error { return unix.Sendto(fd, []byte("!"), unix.MSG_OOB, nil) })
	if got := urgent(t, l.server); got != '!' {
		t.Errorf("urgent byte %q, want '!'", got)
	}
	l.write(l.client, "def")
	l.read(l.server, "def")
	l.client.Close()
	if _, err := io.ReadAll(l.server); err != nil {
		t.Error(err)
	}
}

// urgent waits for a byte of urgent data.
func urgent(t *testing.T, c *net.TCPConn) (b byte) {
	control(t, c, func(fd int) error {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI}}
		if n, err := unix.Poll(p, 10_000); n != 1 {
			return errors.Join(errors.New("no urgent data came"), err)
		}
		buf := make([]byte, 1)
		_, _, err := unix.Recvfrom(fd, buf, unix.MSG_OOB)
		b = buf[0]
		return err
	})
	return b
}

// TestAbortFromOutside: the relay ends with the cause, be it idle or in the middle of something.
func TestAbortFromOutside(t *testing.T) {
	for name, prepare := range map[string]func(*lab){
		"idle": func(l *lab) {
			l.write(l.client, "x")
			l.read(l.server, "x")
		},
		"held up": func(l *lab) { l.fill(l.client) },
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			prepare(l)
			cause := errors.New("the end")
			l.loops.Abort(cause)
			if err := l.wait(); !errors.Is(err, cause) {
				t.Errorf("Relay: %v; want %v", err, cause)
			}
			wantReset(t, l.client)
			wantReset(t, l.server)
		})
	}
}

// TestResetThatComesWithTheEnd: a client that ends its stream and resets at once, to a server that says nothing, does not leave the
// pair behind.
func TestResetThatComesWithTheEnd(t *testing.T) {
	l := newLab(t)
	l.write(l.client, "x")
	l.read(l.server, "x")
	l.near[tcp.Client].Loop().Do(func() { // one poll sees it all
		l.write(l.client, "bye")
		if err := l.client.CloseWrite(); err != nil {
			t.Error(err)
		}
		reset(l.client)
	})
	l.read(l.server, "bye")
	e, ok := errors.AsType[*tcp.Error](l.wait())
	if !ok || e.Side != tcp.Client {
		t.Errorf("Relay: %v; want an error of the client", l.err)
	}
}

// TestIdleTimeout: of a pair that is quiet, and of one that is held up; not of one on which something passes.
func TestIdleTimeout(t *testing.T) {
	for name, prepare := range map[string]func(*lab){
		"quiet": func(l *lab) {
			for range 20 { // longer than the timeout, in all
				l.write(l.server, "x")
				l.read(l.client, "x")
				time.Sleep(10 * time.Millisecond)
			}
		},
		"held up": func(l *lab) {
			data := content(bulk)
			go func() { _, _ = l.client.Write(data) }()
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLabWith(t, loop.Config{Loops: 1}, 150*time.Millisecond)
			prepare(l)
			if err := l.wait(); !errors.Is(err, tcp.ErrIdle) {
				t.Errorf("Relay: %v; want %v", err, tcp.ErrIdle)
			}
			wantReset(t, l.server)
		})
	}
}

// TestQuietPairHoldsNothing but its connections.
func TestQuietPairHoldsNothing(t *testing.T) {
	l := newLab(t)
	send(t, l.server, content(bulk))
	l.write(l.client, "x")
	l.read(l.server, "x")
	if _, err := io.CopyN(io.Discard, l.client, bulk); err != nil {
		t.Fatal(err)
	}
	settle(t, "nothing is held", func() bool {
		f := l.loops.Figures()
		return f.Conns == 2 && f.Coroutines+f.Buffers+f.Free+f.Pipes+f.Timers == 0
	})
}

func TestPassingOnTakesNoAllocation(t *testing.T) {
	l := newLab(t)
	msg, buf := []byte("0123456789"), make([]byte, 10)
	allocs := testing.AllocsPerRun(200, func() {
		l.client.Write(msg)
		io.ReadFull(l.server, buf)
		l.server.Write(msg)
		io.ReadFull(l.client, buf)
	})
	if allocs > 0 {
		t.Errorf("%v allocations for a message each way, want none", allocs)
	}
}
