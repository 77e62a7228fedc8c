// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"sync"
	"sync/atomic"
	"time"
)

// Live counts the live connections of a server up to a limit, and waits for their end.
type Live struct {
	limit int64
	count atomic.Int64
	all   sync.WaitGroup
}

// NewLive allows limit connections at a time.
func NewLive(limit int) *Live {
	return &Live{limit: int64(limit)}
}

// Enter counts a connection in, unless there are as many as may be.
func (l *Live) Enter() bool {
	if l.count.Add(1) > l.limit {
		l.count.Add(-1)
		return false
	}
	l.all.Add(1)
	return true
}

// Leave counts it out.
func (l *Live) Leave() {
	l.count.Add(-1)
	l.all.Done()
}

// Count is the number of live connections.
func (l *Live) Count() int { return int(l.count.Load()) }

// Limit is how many there may be.
func (l *Live) Limit() int { return int(l.limit) }

// Drain waits until no connection is left, timeout has passed, or cut is closed; then it calls abort, which must make
// those that are still there end soon, and waits for them. Nobody may Enter any more. It returns how many were aborted.
func (l *Live) Drain(timeout time.Duration, cut <-chan struct{}, abort func()) int {
	gone := make(chan struct{})
	go func() {
		l.all.Wait()
		close(gone)
	}()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-gone:
		return 0
	case <-timer.C:
	case <-cut:
	}
	left := l.Count()
	abort()
	<-gone
	return left
}
