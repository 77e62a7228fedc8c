// SPDX-License-Identifier: Apache-2.0

// Package tcp relays a connection without looking at what is in it.
//
// What always holds: each byte is passed on once and in order, urgent data as urgent data; the end of one stream is passed
// on as the end of that stream alone; whatever else ends one side, by reset or by silence, resets the other; a side that is
// not read from is not written to by more than one buffer; and when Relay returns, both connections are closed and no
// goroutine of it is left.
package tcp

import (
	"fmt"
	"io"
	"sync"
	"sync/atomic"
)

// Source is the receiving half of a connection.
type Source interface {
	// Recv waits for input, io.EOF at the end of the stream. The data is valid until Release. If urgent, it is one byte of
	// urgent data.
	Recv() (data []byte, urgent bool, err error)
	Release()
	// Watch calls gone, at most once, if the connection is reset while nobody is in Recv. stop waits until the watch is over.
	Watch(gone func(error)) (stop func())
}

// Sink is the sending half.
type Sink interface {
	TrySend(data []byte, urgent bool) (int, error) // what goes without waiting
	Send(data []byte, urgent bool) (int, error)    // all of it
	CloseWrite() error
}

// Conn is one side of a relayed connection. Abort resets it and ends every call that waits; Close is for when both
// streams have ended.
type Conn interface {
	Source
	Sink
	Close() error
	Abort()
}

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

// Counters count the bytes as they are passed on.
type Counters struct {
	Sent     *atomic.Uint64 // client to upstream
	Received *atomic.Uint64 // upstream to client
}

// Relay passes everything between the two until both streams have ended, and takes both over: they are closed when it
// returns. nil means that both ends were passed on; an *Error, that both sides were reset because one was. To end it
// from outside, abort either connection.
func Relay(client, upstream Conn, counters Counters) error {
	r := &relay{client: client, upstream: upstream}
	var back sync.WaitGroup
	back.Go(func() { r.pump(Upstream, upstream, client, counters.Received) })
	r.pump(Client, client, upstream, counters.Sent)
	back.Wait()
	for _, stop := range r.watches {
		if stop != nil {
			stop()
		}
	}
	if err := r.failure(); err != nil {
		return err
	}
	_ = client.Close() // both streams have ended; what a close still reports is nobody's concern
	_ = upstream.Close()
	return nil
}

type relay struct {
	client, upstream Conn
	// watches on sources that have ended, indexed by Side; each is written by its own pump.
	watches [2]func()

	mu    sync.Mutex
	cause *Error // the first failure; those that follow are its consequences
}

// fail resets both sides. It may be called from a pump or from a watch, and any number of times.
func (r *relay) fail(e *Error) {
	r.mu.Lock()
	if r.cause == nil {
		r.cause = e
	}
	r.mu.Unlock()
	r.client.Abort()
	r.upstream.Abort()
}

func (r *relay) failure() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.cause == nil {
		return nil // not a nil *Error in an error
	}
	return r.cause
}

// pump passes on one direction until its end. side is whose stream it is.
func (r *relay) pump(side Side, from Source, to Sink, passed *atomic.Uint64) {
	for {
		data, urgent, err := from.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			r.fail(&Error{Side: side, Err: err})
			return
		}
		n, err := r.send(side, from, to, data, urgent)
		from.Release()
		passed.Add(uint64(n))
		if err != nil {
			r.fail(&Error{Side: 1 - side, Sending: true, Err: err})
			return
		}
	}
	if err := to.CloseWrite(); err != nil {
		r.fail(&Error{Side: 1 - side, Sending: true, Err: err})
		return
	}
	// Nobody reads this side any more, but it may still reset the connection while the other stream goes on.
	r.watches[side] = from.Watch(func(err error) { r.fail(&Error{Side: side, Err: err}) })
}

// send waits until the data is taken. Meanwhile nobody reads the side that it came from, so that one is watched: were it
// to vanish while the other is stuck, nothing would ever end the connection.
func (r *relay) send(side Side, from Source, to Sink, data []byte, urgent bool) (int, error) {
	n, err := to.TrySend(data, urgent)
	if err != nil || n == len(data) {
		return n, err
	}
	stop := from.Watch(func(err error) { r.fail(&Error{Side: side, Err: err}) })
	defer stop()
	m, err := to.Send(data[n:], urgent)
	return n + m, err
}
