// SPDX-License-Identifier: Apache-2.0

package loop

import (
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// acceptBatch is how many connections are accepted before other events are looked at.
	acceptBatch = 64
	// retryAccept is when an accept that failed is tried again even if no connection was closed: the descriptors may have been used
	// up by somebody else.
	retryAccept = 100 * time.Millisecond
)

// Listener accepts connections for the loops of a group. There is one socket, and it is the first loop's: that costs no more than one
// for each loop, and one socket can be assigned connections to (bpf_sk_assign refuses those with SO_REUSEPORT before Linux 6.6).
type Listener struct {
	loop     *Loop
	fd       int32
	slot     int32
	accepted func(c *Conn, from netip.AddrPort)
	failing  func(error)
	retry    timer
	paused   bool
	closed   bool
}

// Serve accepts connections, each for the loop with the fewest. accepted is called there, with the peer's address, which a connection
// that was reset already has lost (Conn.Remote). It must not wait: to Start a handler is what it is for. failing is told that none can
// be accepted now, for want of descriptors or memory, at least every 100 ms while that is so. l is taken over: nobody may use it
// afterwards. It is one of TCP alone (net.ListenConfig.SetMultipathTCP).
func (g *Group) Serve(l *net.TCPListener, accepted func(c *Conn, from netip.AddrPort), failing func(error)) (*Listener, error) {
	fd, err := takeDescriptor(l)
	if err != nil {
		return nil, err
	}
	err = SetStream(fd)
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		closeDescriptor(int32(fd))
		return nil, err
	}
	s := &Listener{loop: g.loops[0], fd: int32(fd), accepted: accepted, failing: failing}
	s.retry.owner = s
	err = net.ErrClosed
	s.loop.Do(func() { err = s.enter() })
	if err != nil {
		closeDescriptor(s.fd)
		return nil, err
	}
	return s, nil
}

func (s *Listener) enter() error {
	l := s.loop
	if l.cause != nil {
		return l.cause
	}
	i := slices.Index(l.listeners, nil)
	if i < 0 {
		i = len(l.listeners)
		l.listeners = append(l.listeners, nil)
	}
	l.listeners[i], s.slot = s, int32(i)
	if errno := s.listen(unix.EPOLL_CTL_ADD, unix.EPOLLIN); errno != 0 {
		l.listeners[i] = nil
		return os.NewSyscallError("epoll_ctl", errno)
	}
	return nil
}

// listen has connections reported, by EPOLLIN, again and again while there are any.
func (s *Listener) listen(op uintptr, events uint32) unix.Errno {
	return epollCtl(s.loop.epoll, op, s.fd, unix.EpollEvent{Events: events, Fd: s.slot})
}

// Close ends the listener and waits until nothing more is accepted. Connections that were not accepted yet are reset.
func (s *Listener) Close() {
	s.loop.Do(s.close)
	for _, l := range s.loop.group.loops[1:] {
		l.Do(func() {}) // what was handed over to it before has arrived
	}
}

func (s *Listener) close() {
	if s.closed {
		return
	}
	s.closed = true
	s.resume()
	s.listen(unix.EPOLL_CTL_DEL, 0) // another process may have the socket too
	s.loop.listeners[s.slot] = nil
	closeDescriptor(s.fd)
}

// accept shares out connections that wait. What it calls comes last: it may end this goroutine.
func (s *Listener) accept() {
	own, others := s.loop, s.loop.group.loops[1:]
	failure := s.acceptBatch()
	for _, to := range others {
		if len(to.handed) > 0 {
			handOver(to)
		}
	}
	own.arrived = append(own.arrived, own.handed...)
	own.handed = own.handed[:0]
	if failure != 0 {
		s.pause()
		own.call(func() { s.failing(os.NewSyscallError("accept", failure)) })
	}
	own.welcome()
}

// acceptBatch accepts what there is, up to a limit, and says for want of what there is not more.
func (s *Listener) acceptBatch() (failure unix.Errno) {
	for range acceptBatch {
		fd, from, errno := accept(s.fd)
		switch errno {
		case 0:
			to := s.loop.group.freest()
			to.open.Add(1) // here, or the next would come to the same
			to.handed = append(to.handed, arrival{s, fd, from})
		case unix.EINTR, unix.ECONNABORTED:
		case unix.EAGAIN:
			return 0
		default:
			return errno
		}
	}
	return 0
}

// arrival is a connection on its way from the first loop, which has accepted it, to its own.
type arrival struct {
	listener *Listener
	fd       int32
	from     netip.AddrPort
}

// handOver gives another loop what was accepted for it.
func handOver(to *Loop) {
	all := to.handed
	to.handed = nil
	posted := to.Post(func() {
		to.arrived = append(to.arrived, all...)
		to.welcome()
	})
	if !posted {
		to.open.Add(-int32(len(all)))
		for _, a := range all {
			closeDescriptor(a.fd)
		}
	}
}

// welcome makes connections of what has arrived, and has them taken over.
func (l *Loop) welcome() {
	for len(l.arrived) > l.welcomed {
		a := l.arrived[l.welcomed]
		l.welcomed++
		c, err := l.arrive(a.fd, 0)
		if err != nil {
			continue // the group was aborted, or there is no memory: it was reset
		}
		taken := false
		l.call(func() {
			defer func() {
				if !taken {
					c.Abort()
				}
			}()
			a.listener.accepted(c, a.from)
			taken = true
		})
	}
	clear(l.arrived)
	l.arrived, l.welcomed = l.arrived[:0], 0
}

// pause stops accepting for a while: the listener would be reported without end. It stays in epoll, for which there may be no memory
// when it is to go on.
func (s *Listener) pause() {
	s.listen(unix.EPOLL_CTL_MOD, 0)
	s.paused = true
	s.loop.group.paused.Add(1)
	s.loop.wheel.set(&s.retry, s.loop.now.Add(retryAccept), s.loop.now)
}

func (s *Listener) resume() {
	if s.paused {
		s.paused = false
		s.loop.group.paused.Add(-1)
		s.loop.wheel.stop(&s.retry)
		s.listen(unix.EPOLL_CTL_MOD, unix.EPOLLIN)
	}
}

func (s *Listener) fire() { s.resume() }

// roomAgain resumes the listeners that wait for descriptors: one was closed.
func (g *Group) roomAgain() {
	if g.paused.Load() == 0 {
		return
	}
	first := g.loops[0]
	first.Post(func() {
		for _, s := range first.listeners {
			if s != nil {
				s.resume()
			}
		}
	})
}
