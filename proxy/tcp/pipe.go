// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// pipeSize is what an unprivileged user may have of a pipe (pipe-max-size in proc_sys_fs(5)).
	pipeSize = 1 << 20
	// maxPipes bounds what is held, in pipes, of streams whose receivers are slow; a user may have 64 of this size
	// (pipe-user-pages-soft). What gets none is copied.
	maxPipes = 16
	// pipesIdle is how long pipes are kept that nobody uses.
	pipesIdle = time.Second
)

// pipe is one of the kernel's, through which bulk goes from socket to socket. It is empty unless it is leased.
type pipe struct{ in, out int }

// pipes lends them.
var pipes pipeList

// pipeList keeps those that are free. Its descriptors are gone soon after the last was given back.
type pipeList struct {
	mu     sync.Mutex
	leased int
	free   []*pipe
	trim   *time.Timer
}

// take leases a pipe; nil if none can be had.
func (l *pipeList) take() *pipe {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.leased == maxPipes {
		return nil
	}
	l.leased++
	if n := len(l.free); n > 0 {
		p := l.free[n-1]
		l.free = l.free[:n-1]
		return p
	}
	p := newPipe()
	if p == nil {
		l.leased--
	}
	return p
}

// give ends a lease. A pipe that is not empty is closed.
func (l *pipeList) give(p *pipe, empty bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.leased--
	if !empty {
		p.close()
		return
	}
	l.free = append(l.free, p)
	if l.trim == nil {
		l.trim = time.AfterFunc(pipesIdle, l.closeFree)
	} else {
		l.trim.Reset(pipesIdle)
	}
}

func (l *pipeList) closeFree() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range l.free {
		p.close()
	}
	l.free = nil
}

// newPipe makes a pipe of the full size; a smaller one is no better than copying.
func newPipe() *pipe {
	var fds [2]int
	if unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK) != nil {
		return nil
	}
	p := &pipe{in: fds[1], out: fds[0]}
	if _, err := unix.FcntlInt(uintptr(p.in), unix.F_SETPIPE_SZ, pipeSize); err != nil {
		p.close()
		return nil
	}
	return p
}

func (p *pipe) close() {
	_ = unix.Close(p.in)
	_ = unix.Close(p.out)
}
