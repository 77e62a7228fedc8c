// SPDX-License-Identifier: Apache-2.0

package loop

import (
	"context"
	"iter"
	"net"
	"runtime"
	"runtime/pprof"
	"slices"
	"time"
)

// coroutine is what handlers run on. When one has returned it is used again.
type coroutine struct {
	loop  *Loop
	next  func() (struct{}, bool) // resumes it, until it parks or is done; for Loop.turn alone
	stop  func()                  // ends a free one
	yield func(struct{}) bool

	conn   *Conn       // whose handler it runs; or
	job    func(*Loop) // what it runs
	parked bool
	why    error // it was woken: nil, to try again
	cause  error // interrupted: whatever it waits for fails
	alarm  timer // of Sleep
	place  int   // in loop.all
}

// start has a coroutine run the handler of a connection, or a job.
func (l *Loop) start(c *Conn, job func(*Loop)) *coroutine {
	co, ok := l.coroutines.take()
	if !ok {
		co = l.newCoroutine()
	}
	l.count.busy++
	co.conn, co.job = c, job
	if l.ending {
		co.cause = net.ErrClosed
	}
	l.ready = append(l.ready, co)
	return co
}

func (l *Loop) newCoroutine() *coroutine {
	co := &coroutine{loop: l, place: len(l.all)}
	co.alarm.owner = co
	l.all = append(l.all, co)
	co.next, co.stop = iter.Pull(func(yield func(struct{}) bool) {
		co.yield = yield
		for {
			co.run()
			if !yield(struct{}{}) {
				return
			}
		}
	})
	return co
}

// run runs what the coroutine was started for. Then it is free, or run again in the next turn: its connection has more input.
func (co *coroutine) run() {
	l, c := co.loop, co.conn
	finished := false
	defer func() {
		v := recover()
		if finished {
			return
		}
		if v == nil { // Goexit: this goroutine is about to end, and the loop's with it
			l.group.panicked.Add(1)
			l.group.cfg.Log.Error("a handler called runtime.Goexit")
			l.forget(co)
		} else {
			l.panicked(v)
		}
		if c != nil {
			c.running = nil
			c.Abort()
		}
		l.count.busy--
		if v != nil {
			co.release()
		}
	}()
	pprof.SetGoroutineLabels(context.Background()) // those of the one before
	switch {
	case c == nil:
		co.job(l)
	case c.handler != nil: // else it was taken away since
		c.due = false
		c.handler(c)
	}
	finished = true
	if c != nil {
		if c.wanted() {
			l.ready = append(l.ready, co)
			return
		}
		c.running = nil
	}
	l.count.busy--
	co.release()
}

func (co *coroutine) release() {
	co.conn, co.job, co.why, co.cause = nil, nil, nil, nil
	give(co.loop, &co.loop.coroutines, co)
}

// forget takes a coroutine out that has ended.
func (l *Loop) forget(co *coroutine) {
	last := l.all[len(l.all)-1]
	l.all[co.place], last.place = last, co.place
	l.all[len(l.all)-1] = nil
	l.all = l.all[:len(l.all)-1]
}

// here is the coroutine that calls.
func (l *Loop) here() *coroutine {
	if l.current == nil {
		panic("loop: to wait takes a handler: Loop.Go starts one")
	}
	return l.current
}

// wait parks the coroutine until it is woken and returns why. on is what it waits for, nil if that is no connection: a coroutine
// is told when its own connection has ended, unless that is what it waits for.
func (co *coroutine) wait(on *Conn) error {
	if on == nil || on != co.conn {
		if err := co.lost(); err != nil {
			return err
		}
	}
	if co.cause != nil {
		return co.cause
	}
	return co.park()
}

func (co *coroutine) park() error {
	co.parked = true
	co.yield(struct{}{})
	why := co.why
	co.why = nil
	return why
}

// wake has the coroutine resumed, if it is parked.
func (co *coroutine) wake(why error) {
	if co.parked {
		co.parked, co.why = false, why
		co.loop.ready = append(co.loop.ready, co)
	}
}

// interrupt makes whatever the coroutine waits for fail, now and later.
func (co *coroutine) interrupt(cause error) {
	if co.cause == nil {
		co.cause = cause
		co.wake(cause)
	}
}

func (co *coroutine) fire() { co.wake(nil) }

// Go runs f on another coroutine of this loop, in the next turn.
func (l *Loop) Go(f func(*Loop)) { l.start(nil, f) }

// Yield lets the others of the loop go first. It fails as Sleep does.
func (l *Loop) Yield() error {
	co := l.here()
	if err := co.lost(); err != nil {
		return err
	}
	l.ready = append(l.ready, co)
	co.yield(struct{}{})
	return nil
}

// Sleep waits for that long since this turn began (Now), and up to an eighth and 17 ms longer. It fails with ErrGone if the handler's
// connection is reset meanwhile.
func (l *Loop) Sleep(d time.Duration) error {
	co := l.here()
	l.wheel.set(&co.alarm, l.now.Add(d), l.now)
	err := co.wait(nil)
	l.wheel.stop(&co.alarm)
	return err
}

// Signal is what coroutines of one loop tell each other: that something has changed for which some of them wait. It is used like
// sync.Cond, and without a lock. The zero value is ready.
type Signal struct{ waiting []*coroutine }

// Wait waits for the next Wake. It fails as Sleep does.
func (s *Signal) Wait(l *Loop) error {
	co := l.here()
	s.waiting = append(s.waiting, co)
	err := co.wait(nil)
	if i := slices.Index(s.waiting, co); i >= 0 {
		s.waiting = slices.Delete(s.waiting, i, i+1)
	}
	return err
}

// Wake wakes all that wait, in the order of their coming. They run in the next turn.
func (s *Signal) Wake() {
	for _, co := range s.waiting {
		co.wake(nil)
	}
	clear(s.waiting)
	s.waiting = s.waiting[:0]
}

// Offload runs f on a goroutine of its own, where it may block, compute and touch nothing of the loop, and waits until it has
// returned. Its context is cancelled when the handler's connection is reset. It costs some microseconds.
func (l *Loop) Offload(f func(context.Context)) {
	co := l.here()
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	var over, finished bool // of the loop
	var panicked any
	go func() {
		ok := false
		defer func() {
			v := recover()
			l.Post(func() {
				over, finished, panicked = true, ok, v
				co.wake(nil)
			})
		}()
		f(ctx)
		ok = true
	}()
	l.yields = true
	if err := co.lost(); err != nil {
		cancel(err)
	}
	for !over {
		if err := co.park(); err != nil {
			cancel(err)
		}
	}
	switch {
	case finished:
	case panicked == nil:
		runtime.Goexit()
	default:
		panic(panicked)
	}
}

// lost is why a coroutine is not to wait: it was interrupted, or has lost its connection.
func (co *coroutine) lost() error {
	if co.cause != nil || co.conn == nil {
		return co.cause
	}
	return co.conn.lost()
}
