// SPDX-License-Identifier: Apache-2.0

package loop

import (
	"time"

	"golang.org/x/sys/unix"
)

const (
	// BufferSize is the size of what Loop.Buffer lends.
	BufferSize = 64 << 10
	// pipeSize is what an unprivileged user may have of a pipe (pipe-max-size in proc_sys_fs(5)).
	pipeSize = 1 << 20
	// retryPipe is when the system is asked for a pipe again that it has refused.
	retryPipe = time.Second
	// trimEach is how long something stays free until it is given back to the system; it may be twice as long.
	trimEach = time.Second
)

// freeList keeps what will be needed again soon; the last that was given is taken first, as it may still be in a cache.
type freeList[T any] struct {
	items []T
	least int // how many there were, at least, since surplus was called
}

func (f *freeList[T]) take() (item T, ok bool) {
	n := len(f.items) - 1
	if n < 0 {
		return item, false
	}
	item = f.items[n]
	clear(f.items[n:])
	f.items = f.items[:n]
	f.least = min(f.least, n)
	return item, true
}

// surplus takes out what nobody has needed since it was last called.
func (f *freeList[T]) surplus() []T {
	out := append([]T(nil), f.items[:f.least]...) // the least used
	n := copy(f.items, f.items[f.least:])
	clear(f.items[n:])
	f.items = f.items[:n]
	if f.least = n; n == 0 {
		f.items = nil
	}
	return out
}

// give keeps the item, and sees to it that it is not kept for ever.
func give[T any](l *Loop, f *freeList[T], item T) {
	f.items = append(f.items, item)
	if l.trim.slotTime == 0 {
		l.wheel.set(&l.trim, l.now.Add(trimEach), l.now)
	}
}

// trimmer is the owner of the timer that gives back what nobody needs.
type trimmer struct{ *Loop }

func (t trimmer) fire() {
	l := t.Loop
	l.giveBack()
	if len(l.buffers.items)+len(l.pipes.items)+len(l.coroutines.items) > 0 {
		l.wheel.set(&l.trim, l.now.Add(trimEach), l.now)
	}
}

func (l *Loop) giveBack() {
	for _, b := range l.buffers.surplus() {
		_ = unix.Munmap(b) // fails only for what was not mapped
	}
	for _, p := range l.pipes.surplus() {
		l.closePipe(p)
	}
	for _, co := range l.coroutines.surplus() {
		l.forget(co)
		co.stop()
	}
}

// Buffer lends a buffer of BufferSize bytes, with whatever was in it. It is not of the Go heap.
func (l *Loop) Buffer() []byte {
	b, ok := l.buffers.take()
	if !ok {
		var err error
		if b, err = unix.Mmap(-1, 0, BufferSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE); err != nil {
			panic("loop: no memory for a buffer: " + err.Error()) // as the Go heap would; of a handler, it ends the connection
		}
	}
	l.count.buffers++
	return b
}

// Release takes back what Buffer has lent: that very slice. Nobody may touch it afterwards.
func (l *Loop) Release(b []byte) {
	if cap(b) != BufferSize || len(b) != BufferSize {
		panic("loop: released what is no buffer")
	}
	l.count.buffers--
	give(l, &l.buffers, b)
}

// pipe is one of the kernel's, through which bulk goes from socket to socket. One that is free is empty.
type pipe struct{ in, out int32 }

// takePipe lends a pipe, if one can be had.
func (l *Loop) takePipe() (p pipe, ok bool) {
	if p, ok = l.pipes.take(); ok {
		return p, true
	}
	if l.count.pipes >= l.group.cfg.Pipes || l.now < l.noPipe {
		return p, false
	}
	l.noPipe = l.now.Add(retryPipe) // unless it turns out well
	var fds [2]int
	if unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK) != nil {
		return p, false
	}
	l.count.pipes++
	p = pipe{in: int32(fds[1]), out: int32(fds[0])}
	// A smaller one, which is what a user gets who has many, is no better than copying.
	if _, err := unix.FcntlInt(uintptr(p.in), unix.F_SETPIPE_SZ, pipeSize); err != nil {
		l.closePipe(p)
		return p, false
	}
	l.noPipe = 0
	return p, true
}

func (l *Loop) closePipe(p pipe) {
	l.count.pipes--
	closeDescriptor(p.in)
	closeDescriptor(p.out)
}
