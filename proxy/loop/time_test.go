// SPDX-License-Identifier: Apache-2.0

package loop

import (
	"math/rand/v2"
	"testing"
	"time"
)

// ring is the owner of a timer that notes when it fired.
type ring struct {
	timer
	at   Time
	now  *Time
	then func()
}

func (r *ring) fire() {
	r.at = *r.now
	if r.then != nil {
		r.then()
	}
}

func newRing(now *Time) *ring {
	r := &ring{now: now}
	r.owner = r
	return r
}

// TestWheel: each timer fires once, not early, and late by no more than an eighth of its time and a tick, if the wheel is moved when it
// asks for it.
func TestWheel(t *testing.T) {
	var w wheel
	now := clock()
	begin := now
	var all []*ring
	for i := range 20_000 {
		r := newRing(&now)
		w.set(&r.timer, now.Add(time.Duration(i)*37*time.Millisecond+5), now)
		all = append(all, r)
	}
	want := make([]Time, len(all))
	for i, r := range all {
		want[i] = r.deadline
	}
	wakes := 0
	for w.count > 0 {
		due := w.nextDue()
		if due <= now {
			t.Fatalf("it is due at %d, now is %d", due, now)
		}
		now = due
		wakes++
		w.expire(now)
	}
	for i, r := range all {
		late, span := r.at-want[i], want[i]-begin
		if late < 0 || late > span*8/63+2<<tickBits {
			t.Errorf("timer of %v: %v late", time.Duration(span), time.Duration(late))
		}
	}
	if wakes > 1000 {
		t.Errorf("%d wakes", wakes)
	}
	if w.nextDue() != 0 {
		t.Error("an empty wheel is due")
	}
}

// TestWheelFarAhead: a timer of more than the wheel's span is looked at on the way, and fires when it should.
func TestWheelFarAhead(t *testing.T) {
	var w wheel
	now := clock()
	r := newRing(&now)
	want := now.Add(1000 * time.Hour)
	w.set(&r.timer, want, now)
	for w.count > 0 {
		now = w.nextDue()
		w.expire(now)
	}
	if r.at < want || r.at > want.Add(125*time.Hour) {
		t.Errorf("it fired at %d, want %d", r.at, want)
	}
}

// TestWheelAfterAPause: a wheel that was empty, or that nobody has moved, for long is as exact as another.
func TestWheelAfterAPause(t *testing.T) {
	var w wheel
	now := clock()
	for _, pause := range []time.Duration{0, time.Second, time.Hour, 100 * time.Hour} {
		now = now.Add(pause)
		r := newRing(&now)
		want := now.Add(300 * time.Millisecond)
		w.set(&r.timer, want, now)
		due := w.nextDue()
		if due < want || due > want+2<<tickBits+Time(300*time.Millisecond)*8/63 {
			t.Errorf("after %v: due %v late", pause, time.Duration(due-want))
		}
		now = now.Add(pause) // late
		now = max(now, due)
		if w.expire(now); r.at != now {
			t.Errorf("after %v: it has not fired", pause)
		}
	}
}

// TestWheelThatStandsBehind: events, which may set timers, come before those that are due, so that the wheel stands behind for as long
// as the loop has rested.
func TestWheelThatStandsBehind(t *testing.T) {
	for _, rest := range []time.Duration{time.Second, 10 * time.Second, time.Hour} {
		var w wheel
		now := clock()
		far := newRing(&now)
		w.set(&far.timer, now.Add(1000*time.Hour), now)
		w.expire(now)
		now = now.Add(rest)
		r, set := newRing(&now), now
		const wait = 100 * time.Millisecond
		w.set(&r.timer, now.Add(wait), now)
		w.expire(now)
		for r.at == 0 {
			now = w.nextDue()
			w.expire(now)
		}
		if late := r.at - set.Add(wait); late < 0 || late > 2<<tickBits+Time(wait)*8/63 {
			t.Errorf("after %v: %v late", rest, time.Duration(late))
		}
	}
}

// TestWheelAtRandom: timers that are set, put off, drawn nearer, stopped, and set again by one that fires. Those that are set fire,
// and no others.
func TestWheelAtRandom(t *testing.T) {
	var w wheel
	now := clock()
	random := rand.New(rand.NewPCG(1, 2))
	const many = 200
	want := map[*ring]Time{}
	var all []*ring
	for range many {
		r := newRing(&now)
		r.then = func() {
			if want[r] == 0 || now < want[r] {
				t.Errorf("it fired at %d, want %d", now, want[r])
			}
			delete(want, r)
			if random.IntN(2) == 0 {
				other := all[random.IntN(many)]
				want[other] = now.Add(time.Duration(random.Int64N(1e9)))
				w.set(&other.timer, want[other], now)
			}
			if random.IntN(4) == 0 {
				other := all[random.IntN(many)]
				delete(want, other)
				w.stop(&other.timer)
			}
		}
		all = append(all, r)
	}
	for range 100_000 {
		r := all[random.IntN(many)]
		switch random.IntN(4) {
		case 0:
			delete(want, r)
			w.stop(&r.timer)
		case 1:
			now = now.Add(time.Duration(random.Int64N(1e8)))
			w.expire(now)
		default:
			want[r] = now.Add(time.Duration(random.Int64N(1 << random.IntN(45))))
			w.set(&r.timer, want[r], now)
		}
	}
	for w.count > 0 {
		now = w.nextDue()
		w.expire(now)
	}
	if len(want) > 0 {
		t.Errorf("%d have not fired", len(want))
	}
}
