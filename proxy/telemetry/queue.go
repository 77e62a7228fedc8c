// SPDX-License-Identifier: Apache-2.0

package telemetry

import (
	"io"
	"sync"
	"time"
)

// queued is how much a Queue keeps for a reader that is slow. What comes then is dropped, and counted.
const queued = 1 << 20

// Queue is a writer for logs that never makes its caller wait: whoever carries connections must not be held up by whoever reads the
// log, be it a terminal that was stopped or a pipe that is full. Each Write is a line, and is written as a whole, in order, or not
// at all.
type Queue struct {
	to      io.Writer
	dropped func(lines int)

	mu      sync.Mutex
	lines   []byte
	lost    int
	writing chan struct{} // closed when all is written; nil: nothing is being written
}

// NewQueue writes to w, which nobody else does meanwhile. dropped is told, when there is room again, how many lines were lost.
func NewQueue(w io.Writer, dropped func(lines int)) *Queue { return &Queue{to: w, dropped: dropped} }

// Write takes a line. It does not fail.
func (q *Queue) Write(line []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.lines)+len(line) > queued {
		q.lost++
		return len(line), nil
	}
	q.lines = append(q.lines, line...)
	if q.writing == nil {
		q.writing = make(chan struct{})
		go q.write(q.writing)
	}
	return len(line), nil
}

// write writes until nothing is left.
func (q *Queue) write(done chan<- struct{}) {
	defer close(done)
	for {
		q.mu.Lock()
		lines, lost := q.lines, q.lost
		q.lines, q.lost = nil, 0
		if len(lines) == 0 && lost == 0 {
			q.writing = nil
			q.mu.Unlock()
			return
		}
		q.mu.Unlock()
		if lost > 0 {
			q.dropped(lost)
		}
		_, _ = q.to.Write(lines) // there is nobody to tell
	}
}

// Flush waits until what was written is there, but no longer than limit.
func (q *Queue) Flush(limit time.Duration) {
	q.mu.Lock()
	writing := q.writing
	q.mu.Unlock()
	if writing == nil {
		return
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-writing:
	case <-timer.C:
	}
}
