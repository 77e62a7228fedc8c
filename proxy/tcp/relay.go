// SPDX-License-Identifier: Apache-2.0

// Package tcp relays a connection without looking at what is in it.
//
// What always holds: each byte is passed on once and in order, urgent data as urgent data; the end of one stream is passed
// on as the end of that stream alone; whatever else ends one side, by reset or by silence, resets the other; of a side that
// does not take what it is sent, one buffer or one pipe is held and no more is read; and when Relay returns, both connections
// are closed and no goroutine of it is left.
//
// What comes in small pieces is copied by way of a buffer; what comes in bulk stays in the kernel, as splice(2) moves it.
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
	WaitInput() error // until Recv would not wait
	// SpliceTo moves input that is there to a pipe, without waiting. Nothing: Recv tells why.
	SpliceTo(pipe, size int) (int, error)
	// Watch calls gone, at most once, if the connection is reset while nobody is in Recv. stop waits until the watch is over.
	Watch(gone func(error)) (stop func())
}

// Sink is the sending half.
type Sink interface {
	TrySend(data []byte, urgent bool) (int, error) // what goes without waiting
	Send(data []byte, urgent bool) (int, error)    // all of it
	TrySplice(pipe, size int) (int, error)         // of what is in a pipe, what goes without waiting
	Splice(pipe, size int) (int, error)            // all of it
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
	for full := 0; ; {
		data, urgent, err := from.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			r.fail(&Error{Side: side, Err: err})
			return
		}
		piece := len(data)
		n, err := r.send(side, from, to, data, urgent)
		from.Release()
		passed.Add(uint64(n))
		if err != nil {
			r.fail(&Error{Side: 1 - side, Sending: true, Err: err})
			return
		}
		if piece < bulkPiece {
			full = 0
			continue
		}
		if full++; full < 2 {
			continue
		}
		full = 0
		if err := r.splice(side, from, to, passed); err != nil {
			r.fail(err)
			return
		}
	}
	if err := to.CloseWrite(); err != nil {
		r.fail(&Error{Side: 1 - side, Sending: true, Err: err})
		return
	}
	// Nobody reads this side any more, but it may still reset the connection while the other stream goes on.
	r.watches[side] = r.watch(side, from)
}

// send waits until the data is taken. Meanwhile nobody reads the side that it came from, so that one is watched: were it
// to vanish while the other is stuck, nothing would ever end the connection.
func (r *relay) send(side Side, from Source, to Sink, data []byte, urgent bool) (int, error) {
	n, err := to.TrySend(data, urgent)
	if err != nil || n == len(data) {
		return n, err
	}
	stop := r.watch(side, from)
	defer stop()
	m, err := to.Send(data[n:], urgent)
	return n + m, err
}

func (r *relay) watch(side Side, from Source) (stop func()) {
	return from.Watch(func(err error) { r.fail(&Error{Side: side, Err: err}) })
}

const (
	// bulkPiece is what a read returns if there is more than it takes: two of them in a row are bulk.
	bulkPiece = 64 << 10
	// bulkBurst is the least that comes at once as long as it is bulk; what is less is as well copied.
	bulkBurst = 128 << 10
)

// splice passes on bulk until it is none any more: until less than a burst came before we had to wait. The rest, be it the end, is
// for pump to receive.
func (r *relay) splice(side Side, from Source, to Sink, passed *atomic.Uint64) *Error {
	for {
		burst, err := r.spliceBurst(side, from, to, passed)
		if err != nil || burst < bulkBurst {
			return err
		}
		if err := from.WaitInput(); err != nil {
			return &Error{Side: side, Err: err}
		}
	}
}

// spliceBurst passes on what is there without waiting for more, by a pipe that it holds only for as long.
func (r *relay) spliceBurst(side Side, from Source, to Sink, passed *atomic.Uint64) (burst int, _ *Error) {
	p := pipes.take()
	if p == nil {
		return 0, nil
	}
	in := 0 // the pipe
	defer func() { pipes.give(p, in == 0) }()
	for {
		var err error
		if in, err = from.SpliceTo(p.in, pipeSize); err != nil {
			return burst, &Error{Side: side, Err: err}
		}
		if in == 0 {
			return burst, nil
		}
		burst += in
		n, err := r.sendPipe(side, from, to, p, in)
		passed.Add(uint64(n))
		if in -= n; err != nil {
			return burst, &Error{Side: 1 - side, Sending: true, Err: err}
		}
	}
}

// sendPipe is send for what is in a pipe.
func (r *relay) sendPipe(side Side, from Source, to Sink, p *pipe, size int) (int, error) {
	n, err := to.TrySplice(p.out, size)
	if err != nil || n == size {
		return n, err
	}
	stop := r.watch(side, from)
	defer stop()
	m, err := to.Splice(p.out, size-n)
	return n + m, err
}
