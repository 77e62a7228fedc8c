// SPDX-License-Identifier: Apache-2.0

package listen

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// loopback is a connection: a plain far end, and ours.
func loopback(t *testing.T) (far *net.TCPConn, near *Conn) {
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
	c, err := d.DialContext(context.Background(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	a, err := l.(*net.TCPListener).AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	if near, err = NewConn(a); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(near.Abort)
	return c.(*net.TCPConn), near
}

// pipeOf is the end to read from of a pipe with a content.
func pipeOf(t *testing.T, content []byte) int {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	return int(r.Fd())
}

// TestResetThatASendWasToldOfIsNoEnd: the kernel tells of a reset once. When a send has been told, a read returns 0, as it
// does at the end of a stream; were that passed on, the other side would take a cut stream for a whole one.
func TestResetThatASendWasToldOfIsNoEnd(t *testing.T) {
	for how, send := range map[string]func(*Conn, []byte) (int, error){
		"TrySend":   func(c *Conn, data []byte) (int, error) { return c.TrySend(data, false) },
		"Send":      func(c *Conn, data []byte) (int, error) { return c.Send(data, false) },
		"TrySplice": func(c *Conn, data []byte) (int, error) { return c.TrySplice(pipeOf(t, data), len(data)) },
		"Splice":    func(c *Conn, data []byte) (int, error) { return c.Splice(pipeOf(t, data), len(data)) },
	} {
		t.Run(how, func(t *testing.T) {
			far, near := loopback(t)
			_ = far.SetLinger(0)
			far.Close()
			if n, err := send(near, []byte("x")); n != 0 || !errors.Is(err, unix.ECONNRESET) {
				t.Fatalf("%s: %d, %v; want ECONNRESET", how, n, err)
			}
			if _, _, err := near.Recv(); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("Recv: %v; want ECONNRESET", err)
			}
		})
	}
	t.Run("an end is one", func(t *testing.T) {
		far, near := loopback(t)
		if _, err := near.Send([]byte("x"), false); err != nil {
			t.Fatal(err)
		}
		if err := far.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if _, _, err := near.Recv(); err != io.EOF {
			t.Errorf("Recv: %v; want the end", err)
		}
	})
}

// TestSendWaits: all of the data goes, however often the peer must make room for it.
func TestSendWaits(t *testing.T) {
	far, near := loopback(t)
	data := make([]byte, 16<<20)
	for i := range data {
		data[i] = byte(i >> 10)
	}
	got := make(chan []byte)
	go func() {
		b, _ := io.ReadAll(far)
		got <- b
	}()
	if n, err := near.Send(data, false); n != len(data) || err != nil {
		t.Errorf("Send: %d, %v; want %d", n, err, len(data))
	}
	if err := near.CloseWrite(); err != nil {
		t.Error(err)
	}
	b := <-got
	if string(b) != string(data) {
		t.Errorf("%d bytes arrived, not the %d that were sent", len(b), len(data))
	}
}
