// SPDX-License-Identifier: Apache-2.0

package loop

import (
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// Dial is a connection that is to be made.
type Dial struct {
	Remote netip.AddrPort
	Local  netip.AddrPort     // the zero value: the kernel chooses
	Until  Time               // when to give up; 0: when the kernel does
	Bound  func(fd int) error // sets options of the socket before it is bound; may be nil
}

// Dial connects. Its errors are those of Bound, or the system's, by the names socket, bind and connect; after Until, ErrTimeout; and
// what a coroutine is told that waits.
func (l *Loop) Dial(d Dial) (*Conn, error) {
	fd, err := d.socket()
	if err != nil {
		return nil, err
	}
	errno := connect(fd, d.Remote)
	if errno == unix.EINPROGRESS {
		// A peer of this host has answered already: a send of nothing tells, EAGAIN meaning no.
		_, errno = send(fd, nil, 0)
	}
	switch errno {
	case 0:
		return l.enter(fd, 0)
	case unix.EAGAIN:
		return l.awaitConnect(fd, d.Until)
	default:
		closeDescriptor(fd)
		return nil, os.NewSyscallError("connect", errno)
	}
}

// socket is one that is ready to connect.
func (d *Dial) socket() (_ int32, err error) {
	family := unix.AF_INET6
	if d.Remote.Addr().Is4() {
		family = unix.AF_INET
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	defer func() {
		if err != nil {
			closeDescriptor(int32(fd))
		}
	}()
	if err := SetStream(fd); err != nil {
		return -1, err
	}
	if d.Bound != nil {
		if err := d.Bound(fd); err != nil {
			return -1, err
		}
	}
	if d.Local != (netip.AddrPort{}) {
		err := error(unix.EINVAL) // to be bound to a port at no address
		if d.Local.IsValid() {
			err = unix.Bind(fd, Sockaddr(d.Local))
		}
		if err != nil {
			return -1, os.NewSyscallError("bind", err)
		}
	}
	return int32(fd), nil
}

// awaitConnect waits until the connection is made.
func (l *Loop) awaitConnect(fd int32, until Time) (_ *Conn, err error) {
	c, err := l.enter(fd, unix.EPOLLOUT)
	if err != nil {
		return nil, err
	}
	c.pushes = true
	defer func() {
		if err != nil {
			c.Abort()
		}
	}()
	c.SetDeadline(until)
	for {
		if err := c.wait(&c.writer); err != nil {
			return nil, os.NewSyscallError("connect", err)
		}
		switch _, errno := send(fd, nil, 0); errno {
		case 0:
			c.SetDeadline(0)
			return c, nil
		case unix.EAGAIN: // woken for something else
		default:
			return nil, os.NewSyscallError("connect", errno)
		}
	}
}
