// SPDX-License-Identifier: Apache-2.0

package loop

import (
	"math/bits"
	"time"
)

// Time is an instant of the monotonic clock, in nanoseconds since the process began. The zero value is none.
type Time int64

// Add returns the instant d later.
func (t Time) Add(d time.Duration) Time { return t + Time(d) }

var began = time.Now()

func clock() Time { return Time(time.Since(began)) + 1 }

func (t Time) real() time.Time { return began.Add(time.Duration(t)) }

// timer calls fire of its owner at its deadline or later, unless it was stopped.
type timer struct {
	owner      interface{ fire() }
	deadline   Time // what is wanted; 0: nothing
	slotTime   Time // when its slot is due: not before the deadline, unless that was put off since; 0: it is in no slot
	next, prev *timer
	slot       int16
}

// The wheel has levels of 64 slots; a slot of a level lasts eight times as long as one of the level below. A timer stays in its
// slot until that is due: it is never moved to a lower level, and fires up to an eighth of its time late, never early. It is the
// scheme of the Linux kernel's own timers (kernel/time/timer.c).
const (
	tickBits   = 24 // a tick is 2^24 ns, 16.8 ms
	levelBits  = 3
	levels     = 5 // the last one's slots last 69 s; what lies more than 72 min ahead is looked at again then
	levelSlots = 64
)

type wheel struct {
	slots  [levels * levelSlots]timer // heads of rings; linked to nothing when empty
	filled [levels]uint64             // a bit for each slot with timers
	last   int64                      // the tick up to which everything has fired
	count  int
	due    []*timer
}

func tick(t Time) int64 { return int64(t) >> tickBits }

// set makes the timer fire at the deadline. One that is set already to fire earlier is left where it is: it will find out then.
func (w *wheel) set(t *timer, deadline, now Time) {
	t.deadline = deadline
	if t.slotTime != 0 {
		if deadline >= t.slotTime-1<<tickBits {
			return
		}
		w.remove(t)
	}
	w.insert(t, now)
}

func (w *wheel) stop(t *timer) {
	t.deadline = 0
	w.remove(t)
}

func (w *wheel) insert(t *timer, now Time) {
	if w.count == 0 { // nobody has moved it on
		w.last = max(w.last, tick(now))
	}
	// The wheel may stand behind, for as long as the loop has rested.
	from := max(w.last, tick(now))
	at := max(tick(t.deadline+1<<tickBits-1), w.last+1)
	level, ahead := 0, at-from
	for level < levels-1 && ahead >= (levelSlots-1)<<(levelBits*level) {
		level++
	}
	shift := levelBits * level
	if ahead >= (levelSlots-1)<<shift {
		at = from + (levelSlots-2)<<shift
	}
	turn := (at + 1<<shift - 1) >> shift
	slot := int(turn%levelSlots) + level*levelSlots
	t.slot, t.slotTime = int16(slot), Time(turn<<shift<<tickBits)
	head := &w.slots[slot]
	if head.next == nil {
		head.next, head.prev = head, head
	}
	t.next, t.prev = head, head.prev
	head.prev.next, head.prev = t, t
	w.filled[level] |= 1 << (slot % levelSlots)
	w.count++
}

func (w *wheel) remove(t *timer) {
	if t.slotTime == 0 {
		return
	}
	t.prev.next, t.next.prev = t.next, t.prev
	t.next, t.prev, t.slotTime = nil, nil, 0
	w.count--
	if head := &w.slots[t.slot]; head.next == head {
		w.filled[t.slot/levelSlots] &^= 1 << (t.slot % levelSlots)
	}
}

// nextDue is when the first slot with timers is due; 0: there are none.
func (w *wheel) nextDue() (first Time) {
	if w.count == 0 {
		return 0
	}
	for level, filled := range w.filled {
		if filled == 0 {
			continue
		}
		shift := levelBits * level
		turn := w.last>>shift + 1
		turn += int64(bits.TrailingZeros64(bits.RotateLeft64(filled, -int(turn%levelSlots))))
		if at := Time(turn << shift << tickBits); first == 0 || at < first {
			first = at
		}
	}
	return first
}

// expire fires the timers that are due.
func (w *wheel) expire(now Time) {
	until := tick(now)
	if w.count == 0 || until <= w.last {
		return
	}
	for level := range levels {
		shift := levelBits * level
		from, to := w.last>>shift+1, until>>shift
		for turn := max(from, to-levelSlots+1); turn <= to && w.filled[level] != 0; turn++ {
			head := &w.slots[int(turn%levelSlots)+level*levelSlots]
			for head.next != nil && head.next != head {
				t := head.next
				w.remove(t)
				w.due = append(w.due, t)
			}
		}
	}
	w.last = until
	for i, t := range w.due {
		w.due[i] = nil
		switch {
		case t.deadline == 0 || t.slotTime != 0: // stopped or set anew by one that fired before it
		case t.deadline > now: // put off since
			w.insert(t, now)
		default:
			t.deadline = 0
			t.owner.fire()
		}
	}
	w.due = w.due[:0]
}
