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
// that was reset already has lost (Conn.Remote). It must not wait: to Start a handler is what it is for. failing is told that none can be accepted now, for want of descriptors or memory, at least every 100 ms while that
// is so. The listener is taken over: nobody may use l afterwards. It is one of TCP alone (net.ListenConfig.SetMultipathTCP).
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
	if errno := s.listen(); errno != 0 {
		l.listeners[i] = nil
		return os.NewSyscallError("epoll_ctl", errno)
	}
	return nil
}

// listen has connections reported, again and again while there are any.
func (s *Listener) listen() unix.Errno {
	return epollCtl(s.loop.epoll, unix.EPOLL_CTL_ADD, s.fd, unix.EpollEvent{Events: unix.EPOLLIN, Fd: s.slot})
}

// Close ends the listener and waits until nothing more is accepted. Connections that were not accepted yet are reset.
func (s *Listener) Close() {
	s.loop.Do(func() {
		if s.closed {
			return
		}
		s.closed = true
		s.resume()
		s.loop.listeners[s.slot] = nil
		closeDescriptor(s.fd)
	})
}

// accept shares out connections that wait.
func (s *Listener) accept() {
	g := s.loop.group
	for range acceptBatch {
		fd, from, errno := accept(s.fd)
		if errno == unix.EINTR || errno == unix.ECONNABORTED {
			continue
		}
		if errno != 0 {
			if errno != unix.EAGAIN {
				s.pause()
				s.loop.call(func() { s.failing(os.NewSyscallError("accept", errno)) })
			}
			break
		}
		to := g.freest()
		to.open.Add(1) // here, or the next would come to the same
		to.arriving = append(to.arriving, arrival{fd, from})
	}
	for _, to := range g.loops {
		all := to.arriving
		if len(all) == 0 {
			continue
		}
		if to == s.loop {
			s.arrive(to, all)
			to.arriving = all[:0]
			continue
		}
		to.arriving = nil
		if !to.Post(func() { s.arrive(to, all) }) {
			to.open.Add(-int32(len(all)))
			for _, a := range all {
				closeDescriptor(a.fd)
			}
		}
	}
}

// arrival is a connection on its way from the first loop, which has accepted it, to its own.
type arrival struct {
	fd   int32
	from netip.AddrPort
}

// arrive makes connections of descriptors, on their loop, and hands them over.
func (s *Listener) arrive(l *Loop, all []arrival) {
	for _, a := range all {
		if c, err := l.arrive(a.fd, 0); err == nil {
			l.call(func() { s.accepted(c, a.from) })
		} // else the group was aborted, or there is no memory: it was reset
	}
}

// pause stops accepting for a while: the listener would be reported without end.
func (s *Listener) pause() {
	epollCtl(s.loop.epoll, unix.EPOLL_CTL_DEL, s.fd, unix.EpollEvent{})
	s.paused = true
	s.loop.group.paused.Add(1)
	s.loop.wheel.set(&s.retry, s.loop.now.Add(retryAccept), s.loop.now)
}

func (s *Listener) resume() {
	if s.paused {
		s.paused = false
		s.loop.group.paused.Add(-1)
		s.loop.wheel.stop(&s.retry)
		s.listen()
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
