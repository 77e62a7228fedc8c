// SPDX-License-Identifier: Apache-2.0

package loop

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Loop carries the connections that belong to it. But for Post, its methods are for handlers and other functions that run on it.
type Loop struct {
	// State is for the loop's users: what they have once for each loop needs no lock.
	State any

	group *Group
	epoll int32
	inbox inbox
	// file is the epoll descriptor as Go's netpoller knows it: to wait for it parks a goroutine, and no system call that blocks
	// holds a processor of the scheduler.
	file  *os.File
	raw   syscall.RawConn
	ask   func(uintptr) bool // polls for events; made once
	armed Time               // the file's deadline; 0: none

	// The turn. It is kept here, and not in variables, so that another goroutine can go on with it (see run).
	events   [256]unix.EpollEvent
	at, n    int // which of the events is next, and how many there are
	failed   unix.Errno
	now      Time
	posts    []func()
	posted   int // how many of the posts were called
	arrived  []arrival
	welcomed int          // how many of those that arrived were taken over
	ready    []*coroutine // to be resumed in the next turn
	batch    []*coroutine // to be resumed in this one
	resumed  int          // how many of the batch were
	current  *coroutine
	yields   bool // somebody was sent to another goroutine
	rested   bool // since the last turn
	since    Time // when Go's scheduler last had its turn
	ending   bool
	cause    error // of everything, once the connections were aborted

	conns     []*Conn // by slot
	vacant    []uint32
	lastGen   uint32
	listeners []*Listener
	handed    []arrival // accepted for this loop by the first one, whose list it is
	all       []*coroutine

	wheel      wheel
	trim       timer
	buffers    freeList[[]byte]
	pipes      freeList[pipe]
	noPipe     Time // until when none is asked for
	coroutines freeList[*coroutine]

	count     struct{ buffers, pipes, busy int }
	turns     uint64
	open      atomic.Int32 // connections, also those on their way here
	began     atomic.Int64 // of the turn that is under way, a Time; 0: the loop rests
	published published
}

// published is what others may read, as of the end of the last turn.
type published struct {
	coroutines, buffers, free, pipes, timers atomic.Int32
	turns                                    atomic.Uint64
}

// inbox is by what other goroutines reach the loop.
type inbox struct {
	event int32 // an eventfd

	mu     sync.Mutex
	posts  []func()
	closed bool
}

// What an event is of: those of connections have a slot and a generation, which is not 0; others the generation 0 and their index
// among the listeners, or this.
const inboxSlot = -1

func newLoop(g *Group) (_ *Loop, err error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	event, err := unix.Eventfd(0, unix.EFD_NONBLOCK|unix.EFD_CLOEXEC)
	if err != nil {
		_ = unix.Close(epoll)
		return nil, os.NewSyscallError("eventfd", err)
	}
	l := &Loop{group: g, epoll: int32(epoll), inbox: inbox{event: int32(event)}, now: clock()}
	l.trim.owner = trimmer{l}
	// Each write is an edge, also if nobody has read: nobody does.
	errno := epollCtl(l.epoll, unix.EPOLL_CTL_ADD, l.inbox.event, unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: inboxSlot})
	err = unix.SetNonblock(epoll, true) // or package os would wait for it in a thread
	l.file = os.NewFile(uintptr(epoll), "epoll")
	if errno != 0 {
		err = os.NewSyscallError("epoll_ctl", errno)
	}
	if err != nil {
		l.free()
		return nil, err
	}
	if err := l.file.SetReadDeadline(time.Time{}); err != nil {
		l.free()
		return nil, fmt.Errorf("wait for an epoll descriptor: %w", err)
	}
	if l.raw, err = l.file.SyscallConn(); err != nil {
		l.free()
		return nil, err
	}
	l.ask = func(uintptr) bool {
		l.n, l.failed = epollPoll(l.epoll, l.events[:])
		some := l.n > 0 || l.failed != 0
		l.rested = l.rested || !some
		return some
	}
	return l, nil
}

// free gives back everything. Nobody uses the loop any more.
func (l *Loop) free() {
	l.giveBack() // what was free for long
	l.giveBack() // and the rest
	l.wheel.stop(&l.trim)
	for _, s := range l.listeners {
		if s != nil {
			s.close()
		}
	}
	_ = l.file.Close()
	closeDescriptor(l.inbox.event)
	l.publish()
}

// Now is when this turn of the loop began.
func (l *Loop) Now() Time { return l.now }

// Post has f run on the loop, soon. f must not wait. It may be called from any goroutine, and reports whether the loop was still
// there.
func (l *Loop) Post(f func()) bool {
	l.inbox.mu.Lock()
	defer l.inbox.mu.Unlock()
	if l.inbox.closed {
		return false
	}
	l.inbox.posts = append(l.inbox.posts, f)
	if len(l.inbox.posts) == 1 {
		wakeUp(l.inbox.event)
	}
	return true
}

// Do has f run on the loop and waits until it has. It is not for those who run on a loop.
func (l *Loop) Do(f func()) bool {
	done := make(chan struct{})
	ok := l.Post(func() {
		defer close(done)
		f()
	})
	if ok {
		<-done
	}
	return ok
}

// run is the loop's goroutine.
//
// A handler that calls runtime.Goexit ends this goroutine too: iter.Pull hands it on. So does what was posted. Then another one goes
// on with the turn.
func (l *Loop) run() {
	over := false
	defer func() {
		if !over {
			l.current = nil
			go l.run()
		}
	}()
	for !over {
		l.turn()
		if over = l.ended(); over {
			l.free()
			l.group.done.Done()
		} else {
			l.rest()
		}
	}
}

// turn handles the events there are, then the timers, then resumes whom they have woken. Those who are woken by that wait for the
// next turn, so that nobody holds up the others.
func (l *Loop) turn() {
	l.now = clock()
	l.began.Store(int64(l.now))
	l.group.dog.wake()
	l.callPosts() // these two are what is left of a turn that was broken
	l.welcome()
	for l.at < l.n {
		l.at++
		l.event(l.events[l.at-1])
	}
	l.at, l.n = 0, 0
	l.wheel.expire(l.now)
	if l.resumed == len(l.batch) {
		clear(l.batch)
		l.batch, l.ready, l.resumed = l.ready, l.batch[:0], 0
	}
	for l.resumed < len(l.batch) {
		l.resumed++
		co := l.batch[l.resumed-1]
		l.current = co
		co.next()
		l.current = nil
	}
	l.turns++
	l.publish()
	l.began.Store(0)
	l.schedule()
}

// longest is for how long a busy loop goes on until it lets Go's scheduler have its turn. After 10 ms it would be preempted by a
// signal, and the runtime's monitor would look every 20 µs whether to do so again.
const longest = Time(4 * time.Millisecond)

// schedule lets other goroutines of this processor run: now and then, and at once if somebody was sent to one.
func (l *Loop) schedule() {
	if l.yields || !l.rested && l.now-l.since > longest {
		runtime.Gosched()
		l.yields, l.rested = false, true
	}
	if l.rested {
		l.rested, l.since = false, l.now
	}
}

// rest waits for events, unless there is somebody to be resumed.
func (l *Loop) rest() {
	if len(l.ready) > 0 {
		l.n, l.failed = epollPoll(l.epoll, l.events[:])
		return
	}
	if due := l.wheel.nextDue(); due != 0 && (l.armed == 0 || due < l.armed) {
		l.armed = due
		_ = l.file.SetReadDeadline(due.real()) // fails only if the file is closed
	}
	l.n = 0
	if err := l.raw.Read(l.ask); err != nil { // the deadline, maybe one that had passed before anybody asked
		l.armed = 0
		_ = l.file.SetReadDeadline(time.Time{})
		l.n, l.failed = epollPoll(l.epoll, l.events[:])
	}
}

func (l *Loop) publish() {
	p := &l.published
	p.coroutines.Store(int32(len(l.all)))
	p.buffers.Store(int32(l.count.buffers))
	p.free.Store(int32(len(l.buffers.items)))
	p.pipes.Store(int32(l.count.pipes))
	p.timers.Store(int32(l.wheel.count))
	p.turns.Store(l.turns)
}

// ended reports whether nothing is left, after Close.
func (l *Loop) ended() bool {
	if !l.ending || l.open.Load() > 0 || l.count.busy > 0 {
		return false
	}
	l.inbox.mu.Lock()
	defer l.inbox.mu.Unlock()
	l.inbox.closed = len(l.inbox.posts) == 0
	return l.inbox.closed
}

func (l *Loop) event(ev unix.EpollEvent) {
	switch {
	case ev.Pad != 0:
		if int(ev.Fd) < len(l.conns) { // else all were closed since
			if c := l.conns[ev.Fd]; c != nil && c.gen == uint32(ev.Pad) { // else this one was
				c.event(ev.Events)
			}
		}
	case ev.Fd == inboxSlot:
		l.readInbox()
	default:
		if listener := l.listeners[ev.Fd]; listener != nil {
			listener.accept()
		}
	}
}

func (l *Loop) readInbox() {
	l.inbox.mu.Lock()
	l.posts, l.inbox.posts = l.inbox.posts, l.posts[:0] // all of ours were called
	l.inbox.mu.Unlock()
	l.callPosts()
}

func (l *Loop) callPosts() {
	for l.posted < len(l.posts) {
		l.posted++
		l.call(l.posts[l.posted-1])
	}
	clear(l.posts)
	l.posts, l.posted = l.posts[:0], 0
}

// call calls what is not ours, outside of a coroutine. If it calls runtime.Goexit, another goroutine goes on with the turn.
func (l *Loop) call(f func()) {
	defer func() {
		if v := recover(); v != nil {
			l.panicked(v)
		}
	}()
	f()
}

func (l *Loop) panicked(v any) {
	l.group.panicked.Add(1)
	l.group.cfg.Log.Error("panic on an event loop", "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
}

// abort resets all connections.
func (l *Loop) abort(cause error) {
	if l.cause == nil {
		l.cause = cause
	}
	for _, c := range l.conns {
		if c != nil {
			c.abort()
		}
	}
}

// enter makes a connection of a descriptor, which it takes over. more are events to be told of beside those of input.
func (l *Loop) enter(fd int32, more uint32) (*Conn, error) {
	l.open.Add(1)
	return l.arrive(fd, more)
}

// arrive is enter for a descriptor that is counted already.
func (l *Loop) arrive(fd int32, more uint32) (_ *Conn, err error) {
	defer func() {
		if err != nil {
			l.open.Add(-1)
			closeDescriptor(fd)
		}
	}()
	if l.cause != nil {
		return nil, l.cause
	}
	c := &Conn{loop: l, fd: fd, gen: l.lastGen + 1}
	if c.gen == 0 {
		c.gen = 1
	}
	l.lastGen = c.gen
	if n := len(l.vacant) - 1; n >= 0 {
		c.slot, l.vacant = l.vacant[n], l.vacant[:n]
	} else {
		c.slot = uint32(len(l.conns))
		l.conns = append(l.conns, nil)
	}
	if errno := c.register(unix.EPOLL_CTL_ADD, more); errno != 0 {
		l.vacant = append(l.vacant, c.slot)
		return nil, os.NewSyscallError("epoll_ctl", errno)
	}
	l.conns[c.slot] = c
	return c, nil
}

// leave takes out a connection whose descriptor is closed.
func (l *Loop) leave(c *Conn) {
	l.conns[c.slot] = nil
	l.vacant = append(l.vacant, c.slot)
	if l.open.Add(-1) == 0 && len(l.vacant) == len(l.conns) {
		l.conns, l.vacant = nil, nil
	}
}

// Adopt makes a connection of package net's one of this loop. Nobody may use tcp afterwards, whether there is an error or not.
func (l *Loop) Adopt(tcp *net.TCPConn) (*Conn, error) {
	fd, err := takeDescriptor(tcp)
	if err != nil {
		return nil, err
	}
	if err := SetStream(fd); err != nil {
		closeDescriptor(int32(fd))
		return nil, err
	}
	return l.enter(int32(fd), 0)
}

// takeDescriptor takes the descriptor from something of package net, which is closed.
func takeDescriptor(from interface {
	SyscallConn() (syscall.RawConn, error)
	Close() error
},
) (fd int, err error) {
	raw, err := from.SyscallConn()
	if err == nil {
		cerr := raw.Control(func(from uintptr) { fd, err = unix.FcntlInt(from, unix.F_DUPFD_CLOEXEC, 0) })
		err = errors.Join(cerr, os.NewSyscallError("dup", err))
	}
	_ = from.Close() // of a descriptor that has another it is no end
	return fd, err
}
