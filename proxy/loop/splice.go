// SPDX-License-Identifier: Apache-2.0

package loop

import (
	"os"

	"golang.org/x/sys/unix"
)

// Splice passes on up to limit bytes of the source's input to the destination without copying them, waits while the destination does
// not take them, and never for more input. It returns how many have arrived there, and whose error it was. If it is neither's and
// fewer than limit have arrived, the source has no more for now, or, if it is still Readable, something that only TryRecv can tell:
// an end, or urgent data. ErrNoPipe, of neither, is in the place of srcErr.
func Splice(dst, src *Conn, limit int) (passed int, srcErr, dstErr error) {
	l := src.loop
	if src.closed {
		return 0, src.gone(), nil
	}
	p, ok := l.takePipe()
	if !ok {
		return 0, ErrNoPipe, nil
	}
	filled := 0 // of the pipe
	defer func() {
		if filled == 0 {
			give(l, &l.pipes, p)
		} else {
			l.closePipe(p) // nobody else is to have what is in it
		}
	}()
	for passed < limit {
		if filled, srcErr = src.fill(p, min(limit-passed, pipeSize)); filled == 0 {
			return passed, srcErr, nil
		}
		for filled > 0 {
			n, err := dst.drain(p, filled)
			passed += n
			filled -= n
			if err != nil {
				return passed, nil, err
			}
		}
		if src.closed {
			return passed, src.gone(), nil
		}
	}
	return passed, nil, nil
}

// fill moves input to an empty pipe; nothing, if there is none or if it is not for splicing. The kernel tells badly which: the end of
// the stream hides urgent data that is still to be read (tcp_splice_read in net/ipv4/tcp.c).
func (c *Conn) fill(p pipe, size int) (int, error) {
	for c.readable && !c.expired {
		n, errno := splice(c.fd, p.in, size)
		switch errno {
		case 0:
			if n == 0 {
				c.look = true
			}
			return n, nil
		case unix.EINTR:
		case unix.EAGAIN, unix.EINVAL:
			c.readable = c.urgency || c.hup || errno == unix.EINVAL
			return 0, nil
		default:
			c.failed, c.told = true, true
			c.readable = false
			return 0, os.NewSyscallError("splice", errno)
		}
	}
	return 0, nil
}

// drain sends what is in a pipe, or waits until it is worth trying again.
func (c *Conn) drain(p pipe, size int) (int, error) {
	if c.closed {
		return 0, c.gone()
	}
	n, errno := splice(p.out, c.fd, size)
	switch errno {
	case 0:
		return n, nil
	case unix.EINTR:
		return 0, nil
	case unix.EAGAIN:
		return 0, c.waitRoom()
	default:
		c.told = true
		return 0, os.NewSyscallError("splice", errno)
	}
}
