// SPDX-License-Identifier: Apache-2.0

package telemetry

import (
	"cmp"
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	shards      = 16 // so that connections that open and close on different CPUs seldom meet at a lock
	recentShard = 16 // finished connections kept per shard: the last 256 in all
)

// Book records all connections of one proxy.
type Book struct {
	access   *slog.Logger
	observer Observer // may be nil
	nextID   atomic.Uint64
	shards   [shards]shard

	registry *prometheus.Registry
	dialTime [directions]prometheus.Observer
}

// shard holds every sixteenth connection. Bytes move from the live record to the totals under mu, together with the
// record's leaving, so that a sum over both under mu never runs backwards.
type shard struct {
	mu     sync.Mutex
	live   map[uint64]*Record
	totals [protocols]totals
	recent [recentShard]Connection // a ring
	closed uint64                  // its next place, modulo recentShard
	_      [64]byte                // the next shard's lock is on another cache line
}

type totals struct {
	opened         [directions]uint64
	closed         [directions][reasons]uint64
	sent, received [directions]uint64
	open           [directions]int
}

// NewBook returns an empty book that writes the access log to access and tells observer, which may be nil.
func NewBook(access *slog.Logger, observer Observer) *Book {
	b := &Book{access: access, observer: observer}
	for i := range b.shards {
		b.shards[i].live = make(map[uint64]*Record)
	}
	b.register()
	return b
}

// Open enters a connection that was just accepted.
func (b *Book) Open(p Protocol, d Direction, source, destination netip.AddrPort) *Record {
	r := &Record{book: b, conn: Connection{
		ID:          b.nextID.Add(1),
		Protocol:    p,
		Direction:   d,
		Source:      source,
		Destination: destination,
		Start:       time.Now(),
	}}
	s := &b.shards[r.conn.ID%shards]
	s.mu.Lock()
	s.live[r.conn.ID] = r
	s.totals[p].opened[d]++
	s.totals[p].open[d]++
	s.mu.Unlock()
	if b.observer != nil {
		b.observer.Opened(r.conn)
	}
	return r
}

func (b *Book) close(c Connection) {
	s := &b.shards[c.ID%shards]
	s.mu.Lock()
	delete(s.live, c.ID)
	t := &s.totals[c.Protocol]
	t.open[c.Direction]--
	t.closed[c.Direction][c.Reason]++
	t.sent[c.Direction] += c.Sent
	t.received[c.Direction] += c.Received
	s.recent[s.closed%recentShard] = c
	s.closed++
	s.mu.Unlock()
	b.log(c)
	if b.observer != nil {
		b.observer.Closed(c)
	}
}

func (b *Book) log(c Connection) {
	if !b.access.Enabled(context.Background(), slog.LevelInfo) {
		return
	}
	attrs := make([]slog.Attr, 0, 10)
	attrs = append(attrs,
		slog.String("protocol", c.Protocol.String()),
		slog.String("direction", c.Direction.String()),
		slog.String("source", c.Source.String()),
		slog.String("destination", c.Destination.String()))
	if c.Upstream.IsValid() {
		attrs = append(attrs, slog.String("upstream_source", c.Upstream.String()))
	}
	attrs = append(attrs,
		slog.Uint64("bytes_sent", c.Sent),
		slog.Uint64("bytes_received", c.Received),
		slog.Float64("duration_ms", float64(c.Duration.Microseconds())/1000),
		slog.String("reason", c.Reason.String()))
	if c.Error != "" {
		attrs = append(attrs, slog.String("error", c.Error))
	}
	b.access.LogAttrs(context.Background(), slog.LevelInfo, "connection", attrs...)
}

// Live lists the live connections, oldest first.
func (b *Book) Live() []Connection {
	now := time.Now()
	all := []Connection{} // [] in JSON, not null
	for i := range b.shards {
		s := &b.shards[i]
		s.mu.Lock()
		for _, r := range s.live {
			all = append(all, r.snapshot(now))
		}
		s.mu.Unlock()
	}
	slices.SortFunc(all, func(a, b Connection) int { return cmp.Compare(a.ID, b.ID) })
	return all
}

// Recent lists the last finished connections, at most 256, in the order in which they ended.
func (b *Book) Recent() []Connection {
	all := []Connection{} // [] in JSON, not null
	for i := range b.shards {
		s := &b.shards[i]
		s.mu.Lock()
		all = append(all, s.recent[:min(s.closed, recentShard)]...)
		s.mu.Unlock()
	}
	slices.SortFunc(all, func(a, b Connection) int {
		return cmp.Or(a.Start.Add(a.Duration).Compare(b.Start.Add(b.Duration)), cmp.Compare(a.ID, b.ID))
	})
	return all
}

// sum adds up all shards, by protocol; the bytes of live connections count.
func (b *Book) sum() (sum [protocols]totals) {
	for i := range b.shards {
		s := &b.shards[i]
		s.mu.Lock()
		for p := range protocols {
			sum[p].add(&s.totals[p])
		}
		for _, r := range s.live {
			t := &sum[r.conn.Protocol]
			t.sent[r.conn.Direction] += r.Sent.Load()
			t.received[r.conn.Direction] += r.Received.Load()
		}
		s.mu.Unlock()
	}
	return sum
}

func (t *totals) add(o *totals) {
	for d := range directions {
		t.opened[d] += o.opened[d]
		t.open[d] += o.open[d]
		t.sent[d] += o.sent[d]
		t.received[d] += o.received[d]
		for r := range reasons {
			t.closed[d][r] += o.closed[d][r]
		}
	}
}
