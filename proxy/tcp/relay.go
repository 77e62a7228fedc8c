// SPDX-License-Identifier: Apache-2.0

// Package tcp relays a connection without looking at what is in it.
//
// What always holds: each byte is passed on once and in order, urgent data as urgent data; the end of one stream is passed
// on as the end of that stream alone; whatever else ends one side, by reset or by silence, resets the other; of a side that
// does not take what it is sent, one buffer or one pipe is held and no more is read; a pair that is quiet holds nothing but
// its two connections; and when done is called, both are closed.
//
// What comes in small pieces is copied by way of a buffer; what comes in bulk stays in the kernel, as splice(2) moves it.
package tcp

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/pillionproxy/pillion/proxy/loop"
)

// Side names the one of the two connections that failed.
type Side uint8

// The sides.
const (
	Client   Side = iota // opened the connection
	Upstream             // was dialled
)

func (s Side) String() string {
	if s == Client {
		return "client"
	}
	return "upstream"
}

// Error says why a relay ended early: what Side did to us.
type Error struct {
	Side    Side
	Sending bool // met while sending to Side, not while receiving from it
	Err     error
}

func (e *Error) Error() string {
	if e.Sending {
		return fmt.Sprintf("send to %s: %v", e.Side, e.Err)
	}
	return fmt.Sprintf("receive from %s: %v", e.Side, e.Err)
}

func (e *Error) Unwrap() error { return e.Err }

var (
	// ErrIdle ends a relay that has passed on nothing for Options.Idle.
	ErrIdle = errors.New("idle for too long")

	// ErrFault ends what a panic has interrupted.
	ErrFault = errors.New("a fault of this proxy, which the log tells of")
)

// Options are of one relay.
type Options struct {
	// The bytes are counted as they are passed on.
	Sent     *atomic.Uint64 // client to upstream
	Received *atomic.Uint64 // upstream to client
	// Idle is for how long nothing may be passed on; 0: for ever.
	Idle time.Duration
	// Done is called, on the loop, when both connections are closed. nil means that both ends were passed on; an *Error, that both
	// sides were reset because one was.
	Done func(error)
}

// Relay passes everything between the two until both streams have ended, and takes both over. They are of one loop, and it is the
// client's handler that calls it, as the last thing that it does.
func Relay(client, upstream *loop.Conn, o Options) {
	r := &relay{idle: o.Idle, done: o.Done}
	r.sides[Client] = side{relay: r, conn: client, passed: o.Sent}
	r.sides[Upstream] = side{relay: r, conn: upstream, passed: o.Received, which: Upstream}
	for i := range r.sides {
		s := &r.sides[i]
		s.conn.State = s
		s.conn.Handle(pump)
	}
	r.touch()
	pump(client)
}

// relay is a pair. It belongs to the loop of its connections.
type relay struct {
	sides [2]side
	idle  time.Duration
	done  func(error)
	over  bool
}

// side is one of the connections, and the stream that comes from it.
type side struct {
	relay  *relay
	conn   *loop.Conn
	passed *atomic.Uint64
	which  Side
	full   uint8 // buffers that were full, in a row, up to bulk
	ended  bool  // the end of its stream was passed on
}

func (s *side) other() *side { return &s.relay.sides[1-s.which] }

// fail resets both sides; the first error counts, those that follow are its consequences.
func (r *relay) fail(e *Error) {
	if r.over {
		return
	}
	r.over = true
	for i := range r.sides {
		r.sides[i].conn.Abort()
	}
	r.done(e)
}

// finish ends it when both streams have ended.
func (r *relay) finish() {
	if r.over || !r.sides[Client].ended || !r.sides[Upstream].ended {
		return
	}
	r.over = true
	for i := range r.sides {
		r.sides[i].conn.Close()
	}
	r.done(nil)
}

// touch notes that something was passed on.
func (r *relay) touch() {
	if r.idle == 0 {
		return
	}
	for i := range r.sides {
		c := r.sides[i].conn
		c.SetDeadline(c.Loop().Now().Add(r.idle))
	}
}

// receiving is the error of a receive from the side.
func (s *side) receiving(err error) *Error {
	if errors.Is(err, loop.ErrTimeout) {
		err = ErrIdle
	}
	return &Error{Side: s.which, Err: err}
}

// sending is that of a send to the other side. The wait for that ends also because this side is gone.
func (s *side) sending(err error) *Error {
	switch {
	case errors.Is(err, loop.ErrGone):
		return s.receiving(s.conn.Failure())
	case errors.Is(err, loop.ErrTimeout):
		err = ErrIdle
	}
	return &Error{Side: 1 - s.which, Sending: true, Err: err}
}
