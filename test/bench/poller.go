// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"

	"golang.org/x/sys/unix"
)

// poller waits for non-blocking sockets, level-triggered: what was left unread is reported again. Client and server of the
// load use it and no goroutines, so that they leave most of the CPUs to what lies between them.
type poller struct {
	epoll  int
	events [256]unix.EpollEvent
}

func newPoller() (*poller, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	return &poller{epoll: epoll}, err
}

func (p *poller) add(fd int, events uint32) error {
	return unix.EpollCtl(p.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)})
}

func (p *poller) change(fd int, events uint32) error {
	return unix.EpollCtl(p.epoll, unix.EPOLL_CTL_MOD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)})
}

// wait returns the sockets on which something happened; none after so many milliseconds, of which -1 are endless. They are
// valid until the next call.
func (p *poller) wait(milliseconds int) ([]unix.EpollEvent, error) {
	for {
		n, err := unix.EpollWait(p.epoll, p.events[:], milliseconds)
		if errors.Is(err, unix.EINTR) {
			continue // Go's preemption
		}
		return p.events[:max(n, 0)], err
	}
}

// byDescriptor finds what belongs to a socket.
type byDescriptor[T any] []*T

func (b *byDescriptor[T]) set(fd int, t *T) {
	for fd >= len(*b) {
		*b = append(*b, nil)
	}
	(*b)[fd] = t
}
