// SPDX-License-Identifier: Apache-2.0

package loop_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/proxy/loop"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// lab is a group whose every thing is given back at the end of the test.
type lab struct {
	*loop.Group
	t   *testing.T
	log *logText
}

// logText collects what is logged.
type logText struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logText) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logText) has(what string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(l.text.String(), what)
}

func newLab(t *testing.T, cfg loop.Config) *lab {
	t.Helper()
	log := new(logText)
	cfg.Log = slog.New(slog.NewTextHandler(log, nil))
	before := descriptors(t)
	g, err := loop.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		g.Close()
		f := g.Figures()
		if f.Conns+f.Coroutines+f.Buffers+f.Free+f.Pipes+f.Timers != 0 {
			t.Errorf("left after Close: %+v", f)
		}
		settle(t, "no descriptor is left", func() bool { return descriptors(t) <= before })
		if t.Failed() {
			t.Log(log.text.String())
		}
	})
	return &lab{g, t, log}
}

func descriptors(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

// serve gives each connection the handler. It returns the address.
func (l *lab) serve(h loop.Handler) string {
	l.t.Helper()
	return l.listen(func(c *loop.Conn) { c.Handle(h) }, func(err error) { l.t.Errorf("accept: %v", err) })
}

func (l *lab) listen(accepted func(*loop.Conn), failing func(error)) string {
	l.t.Helper()
	tcp := listenTCP(l.t)
	s, err := l.Serve(tcp, func(c *loop.Conn, _ netip.AddrPort) { accepted(c) }, failing)
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(s.Close)
	return tcp.Addr().String()
}

func listenTCP(t *testing.T) *net.TCPListener {
	t.Helper()
	var cfg net.ListenConfig
	cfg.SetMultipathTCP(false)
	l, err := cfg.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l.(*net.TCPListener)
}

// run runs f on a coroutine and waits for it.
func (l *lab) run(f func(*loop.Loop)) {
	l.t.Helper()
	if err := l.Run(context.Background(), f); err != nil {
		l.t.Fatal(err)
	}
}

func dial(t *testing.T, address string) *net.TCPConn {
	t.Helper()
	var d net.Dialer
	d.SetMultipathTCP(false)
	c, err := d.DialContext(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(time.Minute)) // a test that hangs says where
	return c.(*net.TCPConn)
}

// ping sends the text and wants it back.
func ping(c net.Conn, text string) error {
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	b := make([]byte, len(text))
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	if string(b) != text {
		return fmt.Errorf("%q came back as %q", text, b)
	}
	return nil
}

func mustPing(t *testing.T, c net.Conn) {
	t.Helper()
	if err := ping(c, "hello"); err != nil {
		t.Fatal(err)
	}
}

// settle waits for a condition.
func settle(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// echo is the handler of the package's documentation.
func echo(c *loop.Conn) {
	buf := c.Loop().Buffer()
	defer c.Loop().Release(buf)
	n, err := c.TryRecv(buf)
	switch {
	case err == loop.ErrAgain:
	case err == io.EOF:
		c.Close()
	case err != nil:
		c.Abort()
	default:
		if _, err := c.Send(buf[:n]); err != nil {
			c.Abort()
		}
	}
}

// content is bytes of which each place tells where it is from.
func content(size int) []byte {
	block := make([]byte, 1<<20-7) // no multiple of anything
	rand.Read(block)
	return bytes.Repeat(block, size/len(block)+1)[:size]
}

func reset(c *net.TCPConn) {
	_ = c.SetLinger(0)
	_ = c.Close()
}
