// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/pillionproxy/pillion/proxy/telemetry"
)

// recorder keeps the connections of a command. It is a telemetry.Observer, and as such must not wait for who reads what it says.
type recorder struct {
	w      *telemetry.Queue
	follow bool

	mu      sync.Mutex
	on      bool
	open    map[uint64]telemetry.Connection
	closed  []telemetry.Connection
	dropped int
}

// recorded bounds the closed connections that are kept; the report says how many more there were.
const recorded = 10000

func newRecorder(w io.Writer, follow bool) *recorder {
	r := &recorder{follow: follow, open: make(map[uint64]telemetry.Connection)}
	r.w = telemetry.NewQueue(w, func(lines int) {
		fmt.Fprintf(r.w, "pillion: %d lines were dropped: they were not read in time\n", lines)
	})
	return r
}

// begin ends the time in which connections are those of our own proofs.
func (r *recorder) begin() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.on = true
}

func (r *recorder) Opened(c telemetry.Connection) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.on {
		return
	}
	r.open[c.ID] = c
	if r.follow {
		fmt.Fprintf(r.w, "pillion: %s %s %s %s -> %s opened\n", stamp(c.Start), c.Direction, c.Protocol, c.Source, c.Destination)
	}
}

func (r *recorder) Closed(c telemetry.Connection) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, known := r.open[c.ID]; !known {
		return
	}
	delete(r.open, c.ID)
	if len(r.closed) < recorded {
		r.closed = append(r.closed, c)
	} else {
		r.dropped++
	}
	if r.follow {
		fmt.Fprintf(r.w, "pillion: %s %s %s %s -> %s closed: %s, %s sent, %s received, %s\n", stamp(c.Start.Add(c.Duration)), c.Direction,
			c.Protocol, c.Source, c.Destination, c.Reason, size(c.Sent), size(c.Received), brief(c.Duration))
	}
}

// report is what a command did.
type report struct {
	Connections []telemetry.Connection `json:"connections"`
	Omitted     int                    `json:"omitted"` // closed connections that were not kept
}

// connections are those seen so far, in the order of their opening. What was said of them is written.
func (r *recorder) connections() report {
	r.w.Flush(flushing)
	r.mu.Lock()
	defer r.mu.Unlock()
	all := slices.Clone(r.closed)
	for _, c := range r.open {
		all = append(all, c)
	}
	slices.SortFunc(all, func(a, b telemetry.Connection) int { return int(a.ID) - int(b.ID) })
	if all == nil {
		all = []telemetry.Connection{}
	}
	return report{Connections: all, Omitted: r.dropped}
}

// reportOptions say where a report goes and how it looks.
type reportOptions struct {
	format reportFormat
	file   string
	follow bool
}

func (o reportOptions) write(stderr io.Writer, r report) (err error) {
	format := o.format
	if format == "auto" {
		format = "none"
		if isTerminal(stderr) || o.file != "" {
			format = "table"
		}
	}
	if format == "none" {
		return nil
	}
	w := stderr
	if o.file != "" {
		f, err := os.Create(o.file)
		if err != nil {
			return fmt.Errorf("--report-file: %w", err)
		}
		defer f.Close()
		w = f
	}
	if format == "json" {
		return writeJSON(w, r)
	}
	return r.writeTable(w)
}

func (r report) writeTable(w io.Writer) error {
	if len(r.Connections) == 0 {
		_, err := fmt.Fprintln(w, "pillion: no TCP connections")
		return err
	}
	t := newTable(w)
	t.row("DIRECTION", "PROTOCOL", "FROM", "TO", "SENT", "RECEIVED", "DIAL", "TIME", "RESULT")
	for _, c := range r.Connections {
		result := c.Reason.String()
		if !c.Closed {
			result = "open"
		}
		if c.Error != "" {
			result += ": " + c.Error
		}
		dial := "-"
		if c.DialTime > 0 {
			dial = brief(c.DialTime)
		}
		t.row(c.Direction.String(), c.Protocol.String(), c.Source.String(), c.Destination.String(), size(c.Sent), size(c.Received), dial, brief(c.Duration), result)
	}
	if err := t.flush(); err != nil {
		return err
	}
	if r.Omitted > 0 {
		_, err := fmt.Fprintf(w, "  and %d more\n", r.Omitted)
		return err
	}
	return nil
}

func stamp(t time.Time) string { return t.Format("15:04:05.000") }

// brief is a duration with three digits.
func brief(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return d.Round(time.Microsecond).String()
	case d < time.Second:
		return d.Round(100 * time.Microsecond).String()
	default:
		return d.Round(10 * time.Millisecond).String()
	}
}

// size is a count of bytes as people read it.
func size(n uint64) string {
	const unit = 1024
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	value, exp := float64(n)/unit, 0
	for value >= unit && exp < 4 {
		value /= unit
		exp++
	}
	return fmt.Sprintf("%.1f %ciB", value, "KMGTP"[exp])
}
