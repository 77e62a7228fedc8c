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

	"github.com/pillionproxy/pillion/proxy/listen"
	"github.com/pillionproxy/pillion/proxy/tcp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// lab is a relay between two connections: client and server are their far ends.
type lab struct {
	t              *testing.T
	client, server *net.TCPConn
	near           [2]*listen.Conn // the relay's ends, indexed by tcp.Side
	sent, received atomic.Uint64
	ended          chan struct{}
	err            error // of Relay, once ended is closed
}

func newLab(t *testing.T) *lab {
	l := &lab{t: t, ended: make(chan struct{})}
	l.client, l.near[tcp.Client] = pair(t)
	l.server, l.near[tcp.Upstream] = pair(t)
	go func() {
		defer close(l.ended)
		l.err = tcp.Relay(l.near[tcp.Client], l.near[tcp.Upstream], tcp.Counters{Sent: &l.sent, Received: &l.received})
	}()
	t.Cleanup(func() {
		l.client.Close()
		l.server.Close()
		<-l.ended
	})
	return l
}

// pair is a connection over loopback: a plain far end, and the end that a proxy would hold.
func pair(t *testing.T) (far *net.TCPConn, near *listen.Conn) {
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
	control(t, a, listen.SetCommon)
	near, err = listen.NewConn(a)
	if err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn), near
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

func TestAbortFromOutside(t *testing.T) {
	for _, side := range []tcp.Side{tcp.Client, tcp.Upstream} {
		t.Run(side.String(), func(t *testing.T) {
			l := newLab(t)
			l.write(l.client, "x")
			l.read(l.server, "x")
			l.near[side].Abort()
			if err := l.wait(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Relay: %v; want net.ErrClosed", err)
			}
			wantReset(t, l.client)
			wantReset(t, l.server)
		})
	}
}

func TestWaitingCostsNoBufferAndPassingOnNoAllocation(t *testing.T) {
	l := newLab(t)
	msg, buf := []byte("0123456789"), make([]byte, 10)
	allocs := testing.AllocsPerRun(200, func() {
		l.client.Write(msg)
		io.ReadFull(l.server, buf)
		l.server.Write(msg)
		io.ReadFull(l.client, buf)
	})
	if allocs > 1 { // the pool may be emptied by the collector meanwhile
		t.Errorf("%v allocations for a message each way, want none", allocs)
	}
}
