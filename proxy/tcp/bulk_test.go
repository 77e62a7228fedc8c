// SPDX-License-Identifier: Apache-2.0

package tcp_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/proxy/loop"
	"github.com/pillionproxy/pillion/proxy/tcp"
	"golang.org/x/sys/unix"
)

// bulk is more than the kernel holds for a stream, so that it comes faster than it is taken.
const bulk = 32 << 20

// pipes is how many pipes the relay has.
func (l *lab) pipes() int { return l.loops.Figures().Pipes }

// settle waits for a condition.
func settle(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// content is bytes of which each place tells where it is from.
func content(size int) []byte {
	block := make([]byte, 1<<20-7) // no multiple of anything
	rand.Read(block)
	return bytes.Repeat(block, size/len(block)+1)[:size]
}

// send writes everything in the background and ends the stream.
func send(t *testing.T, c *net.TCPConn, data []byte) {
	done := make(chan error, 1)
	go func() {
		_, err := c.Write(data)
		done <- errors.Join(err, c.CloseWrite())
	}()
	t.Cleanup(func() {
		c.Close()
		<-done
	})
}

// arrives reads a stream to its end and says how it differs from what was sent.
func arrives(c *net.TCPConn, sent []byte) error {
	b := make([]byte, 1<<20)
	for {
		n, err := c.Read(b)
		if !bytes.HasPrefix(sent, b[:n]) {
			return fmt.Errorf("it differs %d bytes before the end", len(sent))
		}
		sent = sent[n:]
		switch {
		case err == io.EOF && len(sent) == 0:
			return nil
		case err != nil:
			return fmt.Errorf("%d bytes before the end: %w", len(sent), err)
		}
	}
}

// TestBulkBothWays: what stays in the kernel arrives as it was sent, and pipes are gone afterwards.
func TestBulkBothWays(t *testing.T) {
	l := newLab(t)
	up, down := content(bulk), content(bulk-12345)
	send(t, l.client, up)
	send(t, l.server, down)
	settle(t, "both streams are held up", func() bool { return l.pipes() == 2 })
	read := make(chan error)
	go func() { read <- arrives(l.server, up) }()
	go func() { read <- arrives(l.client, down) }()
	if err := errors.Join(<-read, <-read); err != nil {
		t.Error(err)
	}
	if err := l.wait(); err != nil {
		t.Errorf("Relay: %v", err)
	}
	if l.sent.Load() != uint64(len(up)) || l.received.Load() != uint64(len(down)) {
		t.Errorf("counted %d and %d bytes, want %d and %d", l.sent.Load(), l.received.Load(), len(up), len(down))
	}
}

// TestBulkWithoutPipe: where there are no more pipes, bulk is copied.
func TestBulkWithoutPipe(t *testing.T) {
	l := newLabWith(t, loop.Config{Loops: 1, Pipes: 1}, 0)
	up, down := content(bulk), content(bulk)
	send(t, l.client, up)
	settle(t, "one stream has the pipe", func() bool { return l.pipes() == 1 })
	send(t, l.server, down)
	if err := arrives(l.client, down); err != nil {
		t.Error(err)
	}
	if err := arrives(l.server, up); err != nil {
		t.Error(err)
	}
}

// TestStreamHasItsShare of a turn and no more, also where there is no pipe for it.
func TestStreamHasItsShare(t *testing.T) {
	for name, pipes := range map[string]int{"spliced": 1, "copied": -1} {
		t.Run(name, func(t *testing.T) {
			l := newLabWith(t, loop.Config{Loops: 1, Pipes: pipes}, 0)
			var most, last uint64 // of the loop
			on := l.near[tcp.Client].Loop()
			var look func()
			look = func() { // in each turn
				now := l.sent.Load()
				most, last = max(most, now-last), now
				on.Post(look)
			}
			on.Post(look)
			data := content(4 * bulk)
			send(t, l.client, data)
			if err := arrives(l.server, data); err != nil {
				t.Error(err)
			}
			on.Do(func() {
				if most >= 2<<20 { // its pieces, and then bulk
					t.Errorf("%d bytes were passed on in a turn", most)
				}
				look = func() {}
			})
		})
	}
}

// TestResetOfBulk: the reset of either side reaches the other, with a pipe half full; what is in the pipe comes to nobody else.
func TestResetOfBulk(t *testing.T) {
	for _, name := range []string{"sender", "receiver"} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			l.fill(l.client)
			who, other := l.client, l.server
			if name == "receiver" {
				who, other = l.server, l.client
			}
			reset(who)
			if err := l.wait(); err == nil {
				t.Error("Relay: nil, want an error")
			}
			if _, err := io.Copy(io.Discard, other); !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("the other side read until %v; want ECONNRESET", err)
			}
			next, data := newLab(t), content(bulk)
			send(t, next.client, data)
			settle(t, "the next stream has a pipe", func() bool { return next.pipes() > 0 })
			if err := arrives(next.server, data); err != nil {
				t.Errorf("the next stream: %v", err)
			}
		})
	}
}

// TestUrgentDataWithinBulk: the urgent byte stays urgent and in its place, also right before the end of the stream.
func TestUrgentDataWithinBulk(t *testing.T) {
	for name, after := range map[string]int{"in the middle": bulk / 4, "before the end": 0} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			first, second := content(bulk/4), content(after)
			written := make(chan error, 1)
			go func() {
				_, err := l.client.Write(first)
				control(t, l.client, func(fd int) error { return unix.Sendto(fd, []byte("!"), unix.MSG_OOB, nil) })
				_, err2 := l.client.Write(second)
				written <- errors.Join(err, err2, l.client.CloseWrite())
			}()
			got := make([]byte, len(first))
			if _, err := io.ReadFull(l.server, got); err != nil || !bytes.Equal(got, first) {
				t.Fatalf("before the urgent byte: %v", err)
			}
			if b := urgent(t, l.server); b != '!' {
				t.Errorf("urgent byte %q, want '!'", b)
			}
			if err := errors.Join(arrives(l.server, second), <-written); err != nil {
				t.Errorf("after the urgent byte: %v", err)
			}
			if want := uint64(len(first) + 1 + len(second)); l.sent.Load() != want {
				t.Errorf("counted %d bytes, want %d", l.sent.Load(), want)
			}
		})
	}
}
