// SPDX-License-Identifier: Apache-2.0

// Package telemetry keeps the books on connections: the live ones, the last finished ones, an access log of one line per
// connection at its close, and metrics.
//
// What always holds: every connection that was opened here is closed here exactly once, with one Reason; totals never
// run backwards, although the bytes of live connections are part of them; no metric has an address or a name as a label;
// and nothing grows with the number of connections that have been, only with that of the live ones.
package telemetry

import (
	"net/netip"
	"sync/atomic"
	"time"
)

// Connection is a connection as reports show it. It is a copy: it does not change after it was handed out.
type Connection struct {
	ID          uint64         `json:"id"` // unique within this process, in the order of accepting
	Protocol    Protocol       `json:"protocol"`
	Direction   Direction      `json:"direction"`
	Source      netip.AddrPort `json:"source"`                 // who opened it
	Destination netip.AddrPort `json:"destination"`            // whom they meant: the original destination
	Upstream    netip.AddrPort `json:"upstream_source"`        // the local address of the proxy's own dial; zero before it
	Start       time.Time      `json:"start"`                  // when it was accepted
	Duration    time.Duration  `json:"duration_ns"`            // until now, if it is live
	Sent        uint64         `json:"bytes_sent"`             // passed on from source to destination
	Received    uint64         `json:"bytes_received"`         // passed on from destination to source
	Reason      Reason         `json:"reason"`                 // meaningful once it is Closed
	Error       string         `json:"error,omitempty"`        // detail of a Reason that is not OK
	Closed      bool           `json:"closed"`                 // false: it is live
	DialTime    time.Duration  `json:"dial_time_ns,omitempty"` // what the dial took; zero if none succeeded
}

// Observer is told of connections as they come and go. Its methods are called from the event loops that carry the
// connections, several at a time, and must not wait.
type Observer interface {
	Opened(Connection)
	Closed(Connection)
}

// Record is the entry of one live connection. It belongs to the goroutines that carry the connection, which add to the
// two counters as bytes are passed on.
type Record struct {
	Sent, Received atomic.Uint64

	book     *Book
	conn     Connection // of its fields, only those known at the accept; never written after Open
	upstream atomic.Pointer[dialled]
}

// dialled is what becomes known of a connection in the middle of its life.
type dialled struct {
	local netip.AddrPort
	took  time.Duration
}

// Dialled notes the proxy's own side of the connection. UDP does not dial: it took no time.
func (r *Record) Dialled(local netip.AddrPort, took time.Duration) {
	r.upstream.Store(&dialled{local, took})
	if r.conn.Protocol == TCP {
		r.book.dialTime[r.conn.Direction].Observe(took.Seconds())
	}
}

// Close ends the record. It must be called exactly once, after the last byte was counted. err is nil for OK.
func (r *Record) Close(reason Reason, err error) {
	c := r.snapshot(time.Now())
	c.Closed, c.Reason = true, reason
	if err != nil {
		c.Error = err.Error()
	}
	r.book.close(c)
}

func (r *Record) snapshot(now time.Time) Connection {
	c := r.conn
	c.Duration = now.Sub(c.Start)
	c.Sent, c.Received = r.Sent.Load(), r.Received.Load()
	if d := r.upstream.Load(); d != nil {
		c.Upstream, c.DialTime = d.local, d.took
	}
	return c
}
