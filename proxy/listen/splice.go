// SPDX-License-Identifier: Apache-2.0

package listen

import (
	"os"

	"golang.org/x/sys/unix"
)

// WaitInput waits until Recv would not wait. It holds no buffer meanwhile, and belongs to the goroutine of Recv, as SpliceTo does.
func (c *Conn) WaitInput() error {
	return bare(c.raw.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLPRI | unix.POLLRDHUP}}
		n, err := unix.Poll(p, 0)
		return n > 0 && err == nil
	}))
}

// SpliceTo moves input that is there to a pipe, of no more than size bytes and than fit, without copying it and without waiting.
// Nothing was moved if there is nothing, if urgent data is next, or if the stream has ended: Recv tells which. The kernel itself
// tells these apart badly, as the end of the stream hides urgent data that is still to be read (tcp_splice_read in
// net/ipv4/tcp.c).
func (c *Conn) SpliceTo(pipe, size int) (n int, err error) {
	cerr := c.raw.Control(func(fd uintptr) { n, err = splice(int(fd), pipe, size) })
	switch {
	case cerr != nil:
		return 0, bare(cerr)
	case err == unix.EAGAIN, err == unix.EINVAL: // no input; or not for splicing
		return 0, nil
	}
	return n, os.NewSyscallError("splice", err)
}

// TrySplice sends as much of the size bytes in a pipe as goes without waiting, and returns how much that was. It belongs to the
// goroutine of Send, as Splice does.
func (c *Conn) TrySplice(pipe, size int) (sent int, err error) {
	werr := c.raw.Write(func(fd uintptr) bool {
		sent, err = c.spliceFrom(int(fd), pipe, size)
		return true
	})
	if werr != nil || err == unix.EAGAIN {
		return sent, bare(werr)
	}
	return sent, os.NewSyscallError("splice", err)
}

// Splice sends all of the size bytes in a pipe, waiting while the peer does not take them. It returns how many were sent.
func (c *Conn) Splice(pipe, size int) (sent int, err error) {
	werr := c.raw.Write(func(fd uintptr) bool {
		var n int
		n, err = c.spliceFrom(int(fd), pipe, size-sent)
		sent += n
		return err != unix.EAGAIN
	})
	if werr != nil {
		return sent, bare(werr)
	}
	return sent, os.NewSyscallError("splice", err)
}

// spliceFrom sends until all is sent, the socket takes no more (EAGAIN) or fails.
func (c *Conn) spliceFrom(fd, pipe, size int) (sent int, err error) {
	c.sending.Store(true)
	defer c.sending.Store(false)
	for sent < size && err == nil {
		var n int
		n, err = splice(pipe, fd, size-sent)
		sent += n
		if n == 0 && err == nil {
			err = unix.EPIPE // the pipe has less than was said: cannot be
		}
	}
	if err != nil && err != unix.EAGAIN {
		c.told.Store(true)
	}
	return sent, err
}

// splice is splice(2), without waiting.
func splice(from, to, size int) (int, error) {
	for {
		n, err := unix.Splice(from, nil, to, nil, size, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
		if err != unix.EINTR {
			return int(max(n, 0)), err
		}
	}
}
