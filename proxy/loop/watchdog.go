// SPDX-License-Identifier: Apache-2.0

package loop

import (
	"runtime"
	"strings"
	"sync/atomic"
	"time"
)

// watchdog looks, while any loop is at work, for turns that take too long. While all loops rest it does too.
type watchdog struct {
	awake  atomic.Bool
	woken  chan struct{}
	end    chan struct{}
	ended  chan struct{}
	stalls atomic.Uint64
}

func (w *watchdog) start(g *Group) {
	w.woken, w.end, w.ended = make(chan struct{}, 1), make(chan struct{}), make(chan struct{})
	go w.run(g)
}

func (w *watchdog) stop() {
	close(w.end)
	<-w.ended
}

// wake is called at the beginning of each turn.
func (w *watchdog) wake() {
	if !w.awake.Load() && w.awake.CompareAndSwap(false, true) {
		select {
		case w.woken <- struct{}{}:
		default:
		}
	}
}

func (w *watchdog) run(g *Group) {
	defer close(w.ended)
	for {
		select {
		case <-w.woken:
		case <-w.end:
			return
		}
		if !w.watch(g) {
			return
		}
	}
}

// watch looks until all loops rest; false: the end has come.
func (w *watchdog) watch(g *Group) bool {
	ticker := time.NewTicker(g.cfg.Stall / 2)
	defer ticker.Stop()
	logged := make([]int64, len(g.loops)) // the turns of which it has told
	for {
		select {
		case <-ticker.C:
		case <-w.end:
			return false
		}
		w.awake.Store(false) // before looking: a turn that begins now wakes us again
		resting := true
		for i, l := range g.loops {
			began := l.began.Load()
			if began == 0 {
				continue
			}
			resting = false
			took := time.Duration(clock() - Time(began))
			if took >= g.cfg.Stall && logged[i] != began {
				logged[i] = began
				w.stalls.Add(1)
				g.cfg.Log.Error("a handler holds an event loop, and all of its connections wait", "loop", i, "for", took, "stack", handlers())
			}
		}
		if resting {
			return true
		}
		w.awake.Store(true)
	}
}

// handlers are the stacks of those handlers that are not parked.
func handlers() string {
	var found []string
	for stack := range strings.SplitSeq(stacks(), "\n\n") {
		state, _, _ := strings.Cut(stack, "\n")
		if strings.Contains(stack, "loop.(*coroutine).run(") && !strings.Contains(state, "[coroutine") {
			found = append(found, stack)
		}
	}
	if len(found) == 0 {
		return "no handler: something that was posted, or it has gone on since"
	}
	return strings.Join(found, "\n\n")
}

// stacks are those of all goroutines.
func stacks() string {
	const most = 64 << 20
	for size := 1 << 20; ; size *= 2 {
		b := make([]byte, size)
		if n := runtime.Stack(b, true); n < size || size >= most {
			return string(b[:n])
		}
	}
}
