// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"errors"
	"time"

	"github.com/pillionproxy/pillion/proxy/listen"
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
	dial      func(context.Context, upstream.Client) (*upstream.Conn, error)
}

// client is an accepted connection as its handler sees it.
type client interface {
	tcp.Conn
	upstream.Client
}

var (
	errOwnListener = errors.New("the destination is a listener of this proxy: connected to as such, or redirected and forgotten by connection tracking")
	errShutdown    = errors.New("still open when the proxy had to end (--drain-timeout, or a second signal)")
	errLimit       = errors.New("as many connections as may be are open (--max-connections, or the descriptor limit)")
)

// Accepted takes a connection over. What is refused whatever it may be is refused here, without a goroutine.
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
	go r.handle(c)
}

func (r *route) refused(c client, reason telemetry.Reason, err error) {
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

// Room is when a connection has ended.
func (r *route) Room() <-chan struct{} { return r.live.Left() }

// handle carries one connection, from its accept to its close.
func (r *route) handle(c client) {
	defer r.live.Leave()
	record := r.book.Open(telemetry.TCP, r.direction, c.Remote(), c.Local())
	err := r.carry(c, record)
	if err != nil && r.carrying.Err() != nil {
		record.Close(telemetry.Shutdown, errShutdown)
		return
	}
	record.Close(reason(err), err)
}

// carry dials and relays. When it returns, both connections are closed.
func (r *route) carry(c client, record *telemetry.Record) error {
	// Aborting the one side is enough: whatever is being done with it fails, and the other side is reset for that.
	stop := context.AfterFunc(r.carrying, c.Abort)
	defer stop()
	if r.isListener(c.Local()) {
		c.Abort()
		return &refusal{telemetry.OwnListener, errOwnListener}
	}
	start := time.Now()
	u, err := r.connect(c)
	if err != nil {
		c.Abort()
		return err
	}
	record.Dialled(u.Local(), time.Since(start))
	err = tcp.Relay(c, u, tcp.Counters{Sent: &record.Sent, Received: &record.Received})
	if err != nil && u.Captured() {
		return &refusal{telemetry.OwnDialCaptured, upstream.ErrCaptured}
	}
	return err
}

// connect dials for a client; one that vanishes meanwhile takes the dial with it.
func (r *route) connect(c client) (*upstream.Conn, error) {
	ctx, cancel := context.WithCancelCause(r.carrying)
	defer cancel(nil)
	stop := c.Watch(func(err error) { cancel(&tcp.Error{Side: tcp.Client, Err: err}) })
	u, err := r.dial(ctx, c)
	stop()
	if cause := context.Cause(ctx); cause != nil { // the client is gone, or we are to go
		if u != nil {
			u.Abort()
		}
		return nil, cause
	}
	return u, err
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
