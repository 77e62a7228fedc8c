// SPDX-License-Identifier: Apache-2.0

package tcp_test

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/proxy/loop"
	"github.com/pillionproxy/pillion/proxy/tcp"
	"golang.org/x/sys/unix"
)

// ends are the ways in which connections end. A client names its way in its first byte, so that the server does its part.
var ends = map[byte]struct {
	client, server func(*net.TCPConn) error
}{
	'c': {clientFirst, answerAndEnd},
	's': {serverFirst, endFirst},
	'r': {resetIt, untilReset},
	'R': {untilReset, resetIt},
	'h': {clientFirst, answerMuch}, // the half that is left open carries what has been answered
	'q': {untilReset, untilReset},  // silence: the idle timeout ends it
	'k': {untilReset, untilEnd},    // killed: the kernel ends it
}

func clientFirst(c *net.TCPConn) error {
	if err := c.CloseWrite(); err != nil {
		return err
	}
	return untilEnd(c)
}

func answerAndEnd(c *net.TCPConn) error {
	if err := untilEnd(c); err != nil {
		return err
	}
	_, err := c.Write([]byte("answer"))
	return err
}

func answerMuch(c *net.TCPConn) error {
	if err := untilEnd(c); err != nil {
		return err
	}
	_, err := c.Write(make([]byte, 300_000))
	return err
}

func serverFirst(c *net.TCPConn) error {
	if err := untilEnd(c); err != nil {
		return err
	}
	_, err := c.Write([]byte("late"))
	return err
}

func endFirst(c *net.TCPConn) error {
	if err := c.CloseWrite(); err != nil {
		return err
	}
	return untilEnd(c)
}

func resetIt(c *net.TCPConn) error {
	_, err := c.Write([]byte("something that may get lost"))
	return errors.Join(err, c.SetLinger(0))
}

func untilEnd(c *net.TCPConn) error {
	_, err := io.Copy(io.Discard, c)
	return err
}

func untilReset(c *net.TCPConn) error {
	if _, err := io.Copy(io.Discard, c); err == nil {
		return errors.New("an end, where a reset was due")
	}
	return nil
}

// many is a relay for any number of connections, to a server that ends them as their clients want.
type many struct {
	t      *testing.T
	loops  *loop.Group
	at     string // where clients connect to
	quick  string // the same, with a short idle timeout
	carry  atomic.Int64
	failed atomic.Int64
}

func newMany(t *testing.T) *many {
	t.Helper()
	g, err := loop.New(loop.Config{Loops: 2})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.Close)
	m := &many{t: t, loops: g}
	server := m.serve()
	m.at = m.relay(server, 0)
	m.quick = m.relay(server, 100*time.Millisecond)
	return m
}

func listenPlain(t *testing.T) *net.TCPListener {
	t.Helper()
	var cfg net.ListenConfig
	cfg.SetMultipathTCP(false)
	l, err := cfg.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l.(*net.TCPListener)
}

// serve is the server.
func (m *many) serve() netip.AddrPort {
	l := listenPlain(m.t)
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer c.Close()
				var way [1]byte
				if _, err := io.ReadFull(c, way[:]); err != nil {
					return // its client was reset before it said anything
				}
				if err := ends[way[0]].server(c); err != nil {
					m.failed.Add(1)
					m.t.Logf("server of %q: %v", way[0], err)
				}
			})
		}
	})
	m.t.Cleanup(func() {
		_ = l.Close()
		serving.Wait()
	})
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// relay listens, and relays to the server.
func (m *many) relay(to netip.AddrPort, idle time.Duration) string {
	l := listenPlain(m.t)
	at := l.Addr().String()
	var sent, received atomic.Uint64
	serving, err := m.loops.Serve(l, func(c *loop.Conn, _ netip.AddrPort) {
		m.carry.Add(1)
		c.Start(func(c *loop.Conn) {
			u, err := c.Loop().Dial(loop.Dial{Remote: to})
			if err != nil {
				c.Abort()
				m.carry.Add(-1)
				return
			}
			tcp.Relay(c, u, tcp.Options{Sent: &sent, Received: &received, Idle: idle, Done: func(error) { m.carry.Add(-1) }})
		})
	}, func(err error) { m.t.Error(err) })
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(serving.Close)
	return at
}

// connect makes a connection that ends in one way.
func (m *many) connect(way byte) error {
	at := m.at
	if way == 'q' {
		at = m.quick
	}
	conn, err := net.Dial("tcp", at)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := conn.Write([]byte{way}); err != nil {
		if way == 'q' && errors.Is(err, unix.ECONNRESET) { // we were silent for too long already
			return nil
		}
		return err
	}
	return ends[way].client(conn.(*net.TCPConn))
}

// TestTenThousandConnectionsLeaveNothing, however they end: no descriptor, coroutine, buffer, pipe or timer.
func TestTenThousandConnectionsLeaveNothing(t *testing.T) {
	if at := os.Getenv("PILLION_TEST_VICTIM"); at != "" {
		victim(at)
		return
	}
	m := newMany(t)
	settle(t, "the loops are there", func() bool { return m.loops.Figures().Turns > 0 })
	before := openFiles(t)
	const rounds, atOnce = 15, 100
	ways := []byte("csrRhq")
	for range rounds {
		var clients sync.WaitGroup
		for _, way := range ways {
			for range atOnce {
				clients.Go(func() {
					if err := m.connect(way); err != nil {
						m.failed.Add(1)
						t.Logf("client of %q: %v", way, err)
					}
				})
			}
		}
		clients.Wait()
	}
	for range 5 {
		killVictim(t, m)
	}
	settle(t, "nothing is left", func() bool {
		f := m.loops.Figures()
		return m.carry.Load() == 0 && f.Conns+f.Coroutines+f.Buffers+f.Free+f.Pipes+f.Timers == 0 && openFiles(t) <= before
	})
	if f := m.loops.Figures(); f.Panics > 0 || m.failed.Load() > 0 {
		t.Errorf("%d connections did not end as they should; %+v", m.failed.Load(), f)
	}
}

// victims is how many connections a process has that is killed.
const victims = 200

// killVictim kills a process in the middle of many connections.
func killVictim(t *testing.T, m *many) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), "PILLION_TEST_VICTIM="+m.at)
	ready, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_, rerr := io.ReadFull(ready, make([]byte, 1))
	settle(t, "its connections are carried", func() bool { return m.carry.Load() >= victims })
	if err := cmd.Process.Kill(); err != nil || rerr != nil {
		t.Error(err, rerr)
	}
	_ = cmd.Wait()
	settle(t, "its connections have ended", func() bool { return m.carry.Load() == 0 })
}

// victim makes connections, says so, and waits to be killed.
func victim(at string) {
	var all []net.Conn
	for range victims {
		c, err := net.Dial("tcp", at)
		if err != nil {
			panic(err)
		}
		if _, err := c.Write([]byte{'k'}); err != nil {
			panic(err)
		}
		all = append(all, c)
	}
	os.Stdout.WriteString("!")
	_, _ = io.Copy(io.Discard, all[0])
	select {}
}

func openFiles(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}
