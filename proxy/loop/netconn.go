// SPDX-License-Identifier: Apache-2.0

package loop

import (
	"context"
	"io"
	"net"
	"time"
)

// NetConn is a connection as package net has them, for what is written against that, like crypto/tls: to be used by the handler, which
// is parked where a goroutine would block, or within Offload by any goroutine.
type NetConn struct {
	conn          *Conn
	local, remote net.Addr
	read, write   half
	away          bool // within Offload
}

var _ net.Conn = (*NetConn)(nil)

// NetConn returns the connection as one of package net. It is to be asked for once.
func (c *Conn) NetConn() *NetConn {
	n := &NetConn{conn: c, local: net.TCPAddrFromAddrPort(c.Local()), remote: net.TCPAddrFromAddrPort(c.Remote())}
	n.read.init(c, &c.reader)
	n.write.init(c, &c.writer)
	return n
}

// farAhead is later than anybody waits for, and not so late that it could not be counted.
const farAhead = 100 * 365 * 24 * time.Hour

// half is one direction: its deadline, and who is at it.
type half struct {
	timer
	conn    *Conn
	waiting **coroutine // for the connection
	passed  bool        // the deadline
	taken   bool        // of several who read, or write, one after the other does
	free    Signal      // it is not taken any more
}

func (h *half) init(c *Conn, waiting **coroutine) { h.conn, h.waiting, h.owner = c, waiting, h }

func (h *half) fire() {
	h.passed = true
	if co := *h.waiting; co != nil {
		co.wake(ErrTimeout)
		co.why = ErrTimeout // also if it was woken by something else, and has not gone on yet
	}
}

func (h *half) set(t time.Time) {
	h.passed = false
	wheel, now := &h.conn.loop.wheel, h.conn.loop.now
	switch left := min(time.Until(t), farAhead); {
	case t.IsZero():
		wheel.stop(&h.timer)
	case left <= 0:
		wheel.stop(&h.timer)
		h.fire()
	default:
		wheel.set(&h.timer, clock().Add(left), now)
	}
}

// do calls f, which receives or sends, when nobody else does.
func (h *half) do(f func() (int, error)) (int, error) {
	for h.taken {
		if err := h.free.Wait(h.conn.loop); err != nil {
			return 0, err
		}
	}
	if h.passed {
		return 0, ErrTimeout
	}
	h.taken = true
	defer func() {
		h.taken = false
		h.free.Wake()
	}()
	return f()
}

// on runs f where the connection may be touched.
func (n *NetConn) on(f func()) {
	if !n.away {
		f()
		return
	}
	done := make(chan struct{})
	posted := n.conn.loop.Post(func() {
		n.conn.loop.Go(func(*Loop) {
			defer close(done)
			f()
		})
	})
	if posted { // else everything has failed long ago
		<-done
	}
}

// Offload is Loop.Offload; within f, goroutines may use the connection. Each call then costs some microseconds more.
func (n *NetConn) Offload(f func(context.Context)) {
	n.away = true
	defer func() { n.away = false }()
	n.conn.loop.Offload(f)
}

// Read receives. See net.Conn.
func (n *NetConn) Read(p []byte) (got int, err error) {
	err = net.ErrClosed
	n.on(func() { got, err = n.read.do(func() (int, error) { return n.conn.Recv(p) }) })
	return got, n.error("read", err)
}

// Write sends. See net.Conn.
func (n *NetConn) Write(p []byte) (sent int, err error) {
	err = net.ErrClosed
	n.on(func() { sent, err = n.write.do(func() (int, error) { return n.conn.Send(p) }) })
	return sent, n.error("write", err)
}

// Close ends the connection, and whatever waits for it.
func (n *NetConn) Close() error {
	err := net.ErrClosed
	n.on(func() {
		n.conn.loop.wheel.stop(&n.read.timer)
		n.conn.loop.wheel.stop(&n.write.timer)
		if !n.conn.closed {
			err = nil
			n.conn.Close()
		}
	})
	return n.error("close", err)
}

// CloseWrite ends our stream. See net.TCPConn.
func (n *NetConn) CloseWrite() error {
	err := net.ErrClosed
	n.on(func() { err = n.conn.CloseWrite() })
	return n.error("close", err)
}

// LocalAddr is the address of our end.
func (n *NetConn) LocalAddr() net.Addr { return n.local }

// RemoteAddr is the address of the peer's end.
func (n *NetConn) RemoteAddr() net.Addr { return n.remote }

// SetDeadline sets both deadlines.
func (n *NetConn) SetDeadline(t time.Time) error { return n.set(t, &n.read, &n.write) }

// SetReadDeadline bounds Read, also one that is waiting.
func (n *NetConn) SetReadDeadline(t time.Time) error { return n.set(t, &n.read) }

// SetWriteDeadline bounds Write, also one that is waiting.
func (n *NetConn) SetWriteDeadline(t time.Time) error { return n.set(t, &n.write) }

func (n *NetConn) set(t time.Time, which ...*half) error {
	err := net.ErrClosed
	n.on(func() {
		if n.conn.closed {
			return
		}
		err = nil
		for _, d := range which {
			d.set(t)
		}
	})
	return n.error("set", err)
}

// error is an error as package net has them; io.EOF stays what it is.
func (n *NetConn) error(op string, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return &net.OpError{Op: op, Net: "tcp", Source: n.local, Addr: n.remote, Err: err}
}
