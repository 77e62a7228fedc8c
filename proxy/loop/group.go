// SPDX-License-Identifier: Apache-2.0

package loop

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

// Config is what a Group is made of. The zero value is useful.
type Config struct {
	Loops int           // 0: one for each processor that Go uses (GOMAXPROCS)
	Log   *slog.Logger  // panics and stalls; nil: slog.Default
	Stall time.Duration // for how long a handler may hold its loop until the watchdog logs it; 0: a second
	// Pipes bounds those of a loop; what gets none is copied. 0: its share of 32; less: none. A user may have 64 MiB in pipes
	// (pipe-user-pages-soft in proc_sys_fs(5)); of this size that is 64.
	Pipes int
}

// allPipes is how many pipes all loops of a group have at most, unless Config says otherwise.
const allPipes = 32

// Group is a number of loops among which connections are shared out. Its methods may be called from any goroutine; those that
// wait, not from a loop.
type Group struct {
	cfg   Config
	loops []*Loop
	done  sync.WaitGroup // the loops' goroutines

	// paused are the listeners that wait for descriptors, see Listener.pause.
	paused atomic.Int32

	dog      watchdog
	closing  sync.Once
	panicked atomic.Uint64
}

// New starts the loops. Its error is a want of descriptors.
func New(cfg Config) (*Group, error) {
	if cfg.Loops == 0 {
		cfg.Loops = runtime.GOMAXPROCS(0)
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Stall == 0 {
		cfg.Stall = time.Second
	}
	if cfg.Pipes == 0 {
		cfg.Pipes = max(1, allPipes/cfg.Loops)
	}
	g := &Group{cfg: cfg}
	for range cfg.Loops {
		l, err := newLoop(g)
		if err != nil {
			for _, l := range g.loops {
				l.free()
			}
			return nil, fmt.Errorf("make an event loop: %w", err)
		}
		g.loops = append(g.loops, l)
	}
	g.dog.start(g)
	for _, l := range g.loops {
		g.done.Add(1)
		go l.run()
	}
	return g, nil
}

// freest is the loop with the fewest connections.
func (g *Group) freest() *Loop {
	best := g.loops[0]
	for _, l := range g.loops[1:] {
		if l.open.Load() < best.open.Load() {
			best = l
		}
	}
	return best
}

// Go runs f on a coroutine of the loop with the fewest connections. It reports whether the group was still open.
func (g *Group) Go(f func(*Loop)) bool {
	l := g.freest()
	return l.Post(func() { l.Go(f) })
}

// errPanicked is the result of a Run whose function has not returned.
var errPanicked = errors.New("loop: the function panicked, or called Goexit")

// Run is Go, and waits until f has returned. When ctx is done, whatever f waits for fails with the context's cause.
func (g *Group) Run(ctx context.Context, f func(*Loop)) error {
	l, done := g.freest(), make(chan error, 1)
	var co *coroutine // while f runs; of the loop
	ok := l.Post(func() {
		co = l.start(nil, func(l *Loop) {
			err := errPanicked
			defer func() {
				co = nil
				done <- err
			}()
			f(l)
			err = nil
		})
	})
	if !ok {
		return net.ErrClosed
	}
	stop := context.AfterFunc(ctx, func() {
		l.Post(func() {
			if co != nil {
				co.interrupt(context.Cause(ctx))
			}
		})
	})
	defer stop()
	return <-done
}

// Abort resets every connection of the group, also those that are yet to come: all that is done with them fails with cause. It
// does not wait.
func (g *Group) Abort(cause error) {
	for _, l := range g.loops {
		l.Post(func() { l.abort(cause) })
	}
}

// Close aborts what is left, also of listeners, ends the loops, and waits until everything is given back.
func (g *Group) Close() {
	g.closing.Do(func() {
		for _, l := range g.loops {
			l.Post(func() {
				l.abort(net.ErrClosed)
				for _, co := range l.all {
					co.interrupt(net.ErrClosed)
				}
				l.ending = true
			})
		}
		g.done.Wait()
		g.dog.stop()
	})
}

// Figures are what the loops of a group hold, and have done, in all.
type Figures struct {
	Loops      int
	Conns      int    // open
	Coroutines int    // those of the handlers that run or wait, and free ones
	Buffers    int    // lent
	Free       int    // buffers that are free
	Pipes      int    // lent or free
	Timers     int    // set
	Turns      uint64 // of the loops, since they were made
	Stalls     uint64 // seen by the watchdog
	Panics     uint64 // of handlers; Goexits too
}

// Figures are as of the end of each loop's last turn.
func (g *Group) Figures() Figures {
	f := Figures{Loops: len(g.loops), Stalls: g.dog.stalls.Load(), Panics: g.panicked.Load()}
	for _, l := range g.loops {
		p := &l.published
		f.Conns += int(l.open.Load())
		f.Coroutines += int(p.coroutines.Load())
		f.Buffers += int(p.buffers.Load())
		f.Free += int(p.free.Load())
		f.Pipes += int(p.pipes.Load())
		f.Timers += int(p.timers.Load())
		f.Turns += p.turns.Load()
	}
	return f
}
