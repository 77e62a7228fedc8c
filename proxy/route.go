// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"errors"
	"time"

	"github.com/pillionproxy/pillion/proxy/listen"
	"github.com/pillionproxy/pillion/proxy/loop"
	"github.com/pillionproxy/pillion/proxy/tcp"
	"github.com/pillionproxy/pillion/proxy/telemetry"
	"github.com/pillionproxy/pillion/proxy/upstream"
	"golang.org/x/sys/unix"
)

// route is the way of connections from one listener: it accepts for that listener (listen.Accepter), and knows how they
// are dialled on.
type route struct {
	*Server
	listener  *listen.Listener
	direction telemetry.Direction
	dial      func(*loop.Loop, upstream.Client) (*upstream.Conn, error)
}

var (
	errOwnListener = errors.New("the destination is a listener of this proxy: connected to as such, or redirected and forgotten by connection tracking")
	errShutdown    = errors.New("still open when the proxy had to end (--drain-timeout, or a second signal)")
	errLimit       = errors.New("as many connections as may be are open (--max-connections, or the descriptor limit)")
)

// Accepted takes a connection over. What is refused whatever it may be is refused here.
func (r *route) Accepted(c *listen.Conn) {
	if own, probe := r.dialer.Own(c); own {
		c.Abort()
		if !probe { // a probe's result is for the proof to tell
			r.refused(c, telemetry.OwnDialCaptured, upstream.ErrCaptured)
			r.doubted(c)
		}
		return
	}
	// Where two redirected connections would look alike to us, connection tracking gives the later one another source port, so
	// that a dial of ours can come back unknown. While dials are coming back, nothing redirected is dialled for: that would
	// bring forth the next one, and so on.
	if r.direction == telemetry.Outbound && c.Redirected() && r.state.looping() {
		c.Abort()
		r.refused(c, telemetry.OwnDialCaptured, upstream.ErrCaptured)
		return
	}
	if !r.live.Enter() {
		c.Abort()
		r.refused(c, telemetry.ConnectionLimit, errLimit)
		return
	}
	c.Start(func(conn *loop.Conn) { r.handle(conn, c) })
}

func (r *route) refused(c *listen.Conn, reason telemetry.Reason, err error) {
	r.book.Open(telemetry.TCP, r.direction, c.Remote(), c.Local()).Close(reason, err)
}

// failingQuiet is for how long, in seconds, failing accepts are not logged again.
const failingQuiet = 10

// Failing is told that no connection can be accepted now. They wait in the kernel's queue.
func (r *route) Failing(err error) {
	now, last := time.Now().Unix(), r.failing.Load()
	if now-last >= failingQuiet && r.failing.CompareAndSwap(last, now) {
		r.log.Error("cannot accept connections", "error", err, "open", r.live.Count())
	}
}

// carried is what is kept of a connection while it is relayed. It belongs to the connection's loop.
type carried struct {
	server   *Server
	record   *telemetry.Record
	upstream *upstream.Conn // nil before it is connected
}

// handle is the first handler of a connection: it dials, and hands both to the relay.
func (r *route) handle(conn *loop.Conn, c upstream.Client) {
	carried := &carried{server: r.Server, record: r.book.Open(telemetry.TCP, r.direction, c.Remote(), c.Local())}
	err := tcp.ErrFault
	defer func() {
		if err != nil {
			conn.Abort()
			carried.ended(err)
		}
	}()
	if carried.upstream, err = r.connect(conn, c, carried.record); err != nil {
		return
	}
	tcp.Relay(conn, carried.upstream.Conn, tcp.Options{
		Sent: &carried.record.Sent, Received: &carried.record.Received,
		Idle: r.cfg.IdleTimeout,
		Done: carried.ended,
	})
}

// connect dials for a client; one that vanishes meanwhile takes the dial with it.
func (r *route) connect(conn *loop.Conn, c upstream.Client, record *telemetry.Record) (*upstream.Conn, error) {
	if r.isListener(c.Local()) {
		return nil, &refusal{telemetry.OwnListener, errOwnListener}
	}
	start := time.Now()
	u, err := r.dial(conn.Loop(), c)
	if errors.Is(err, loop.ErrGone) {
		return nil, &tcp.Error{Side: tcp.Client, Err: conn.Failure()}
	}
	if err != nil {
		return nil, err
	}
	record.Dialled(u.Local(), time.Since(start))
	return u, nil
}

// ended closes the books on a connection when both of its sides are closed.
func (c *carried) ended(err error) {
	defer c.server.live.Leave()
	if u := c.upstream; u != nil {
		if err != nil && u.Captured() {
			err = &refusal{telemetry.OwnDialCaptured, upstream.ErrCaptured}
		}
		u.Closed()
	}
	if errors.Is(err, errShutdown) {
		err = errShutdown
	}
	c.record.Close(reason(err), err)
}

// refusal is a connection that the proxy does not carry.
type refusal struct {
	reason telemetry.Reason
	error
}

// reason classifies how carrying a connection ended.
func reason(err error) telemetry.Reason {
	if err == nil {
		return telemetry.OK
	}
	if errors.Is(err, errShutdown) {
		return telemetry.Shutdown
	}
	if e, ok := errors.AsType[*refusal](err); ok {
		return e.reason
	}
	if e, ok := errors.AsType[*upstream.Error](err); ok {
		return e.Reason
	}
	if e, ok := errors.AsType[*tcp.Error](err); ok {
		return relayReason(e)
	}
	return telemetry.InternalError
}

func relayReason(e *tcp.Error) telemetry.Reason {
	reset, timeout := telemetry.ClientReset, telemetry.ClientTimeout
	if e.Side == tcp.Upstream {
		reset, timeout = telemetry.UpstreamReset, telemetry.UpstreamTimeout
	}
	switch {
	case errors.Is(e, tcp.ErrIdle):
		return telemetry.IdleTimeout
	// EPIPE and ENOTCONN are what a socket that was reset says to the second who asks.
	case errors.Is(e, unix.ECONNRESET), errors.Is(e, unix.EPIPE), errors.Is(e, unix.ENOTCONN):
		return reset
	// Retransmission or keepalive gave up; an ICMP error on the way is what it then reports.
	case errors.Is(e, unix.ETIMEDOUT), errors.Is(e, unix.EHOSTUNREACH), errors.Is(e, unix.ENETUNREACH):
		return timeout
	default:
		return telemetry.InternalError
	}
}
