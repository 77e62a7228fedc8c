// SPDX-License-Identifier: Apache-2.0

package loop

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// Errors of connections, beside those of the system, which are of type *os.SyscallError; io.EOF, the end of the peer's stream;
// and net.ErrClosed.
var (
	ErrAgain   = errors.New("nothing there now")
	ErrGone    = errors.New("the connection was reset meanwhile")
	ErrTimeout = os.ErrDeadlineExceeded
	ErrNoPipe  = errors.New("no pipe can be had: copy")
)

// Handler serves a connection. It is called, on a coroutine, when there is input on an idle one, or its end, or its failure, or
// when its deadline has passed. One that leaves input unread when it returns is called again, after the others.
type Handler func(*Conn)

// Conn is a TCP connection of a loop. It is for the loop's handlers alone. One of them may receive while another sends.
type Conn struct {
	// State is for the handler: what is to be kept while none runs.
	State any

	loop           *Loop
	handler        Handler
	running        *coroutine // of the handler
	reader, writer *coroutine // those that wait, for input and for room
	deadline       *deadline  // nil until there is one
	fd             int32
	slot, gen      uint32 // see Loop.conns

	readable bool // there may be input, or an end
	urgency  bool // urgent data was announced, and not received yet
	look     bool // as if it was, for the next byte
	urgent   bool // the last that was received was
	hup      bool // an end or a failure was announced: all that there will ever be to read is there
	failed   bool // a failure was announced, or met
	told     bool // somebody was told of it. The kernel tells once; whoever asks it again takes the failure for an end
	eof      bool // the end of the peer's stream was received
	expired  bool // the deadline has passed, and nobody was told yet
	pushes   bool // room is reported too
	closed   bool
	aborted  bool // closed by the group
	due      bool // the handler is to be called whatever there is
}

// Loop is whose the connection is.
func (c *Conn) Loop() *Loop { return c.loop }

// Handle sets what is called for the connection from now on. nil is nobody: what comes stays where it is.
func (c *Conn) Handle(h Handler) {
	c.handler = h
	c.activate()
}

// Start is Handle, and has the handler called whether there is input or not: in the next turn, or, while another runs, after that.
func (c *Conn) Start(h Handler) {
	c.due = true
	c.Handle(h)
}

// activate has the handler called if there is reason to.
func (c *Conn) activate() {
	if c.running == nil && c.wanted() {
		c.running = c.loop.start(c, nil)
	}
}

// wanted reports whether there is something for the handler.
func (c *Conn) wanted() bool {
	return c.handler != nil && (c.due || !c.closed && (c.readable || c.expired))
}

func (c *Conn) register(op uintptr, more uint32) unix.Errno {
	return epollCtl(c.loop.epoll, op, c.fd, unix.EpollEvent{
		Events: unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLPRI | unix.EPOLLET | more,
		Fd:     int32(c.slot), Pad: int32(c.gen),
	})
}

// event is told what there is now, not only what is new.
func (c *Conn) event(what uint32) {
	const input = unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLPRI | unix.EPOLLHUP
	if what&input != 0 && !c.eof {
		c.readable = true
	}
	if what&(unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		c.hup = true
	}
	if what&unix.EPOLLPRI != 0 {
		c.urgency = true
	}
	if what&unix.EPOLLERR != 0 {
		c.failed, c.readable = true, true
	}
	if c.writer != nil && what&(unix.EPOLLOUT|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		c.writer.wake(nil)
	}
	if !c.readable {
		return
	}
	if c.reader != nil {
		c.reader.wake(nil)
	} else {
		c.activate()
	}
	if c.failed && c.running != nil {
		c.running.wake(ErrGone) // it waits for something else
	}
}

// lost is why whoever serves the connection need not wait for something else.
func (c *Conn) lost() error {
	switch {
	case c.closed:
		return c.gone()
	case c.failed:
		return ErrGone
	}
	return nil
}

// gone is the error of a closed connection.
func (c *Conn) gone() error {
	if c.aborted {
		return c.loop.cause
	}
	return net.ErrClosed
}

// TryRecv receives what is there without waiting. ErrAgain: nothing. A byte that the peer has sent as urgent is received alone, and
// Urgent is true until the next call. io.EOF comes once, when the peer's stream has ended; if the connection fails later, so does
// another TryRecv.
func (c *Conn) TryRecv(p []byte) (int, error) {
	c.urgent = false
	switch {
	case c.closed:
		return 0, c.gone()
	case c.expired:
		c.expired = false
		return 0, ErrTimeout
	case c.failed && (c.eof || !c.readable): // after its end, of which the kernel goes on to tell; or again
		c.readable = false
		return 0, c.Failure()
	}
	for c.readable {
		part := p
		atMark := (c.urgency || c.look) && len(p) > 0 && atMark(c.fd)
		if atMark {
			part = p[:1]
		}
		c.look = false
		n, errno := recv(c.fd, part)
		switch {
		case errno == 0 && n > 0:
			c.received(n, len(p), atMark)
			return n, nil
		case errno == unix.EINTR, errno == unix.EAGAIN && atMark && putOff(c.fd):
			c.look = atMark
		case errno == unix.EAGAIN:
			c.readable = false
			return 0, ErrAgain
		case errno != 0:
			c.readable, c.failed, c.told = false, true, true
			return 0, os.NewSyscallError("read", errno)
		case len(p) == 0:
			return 0, nil
		case c.told: // of a reset the kernel tells once, and then of an end that is none
			c.readable, c.failed = false, true
			return 0, os.NewSyscallError("read", unix.ECONNRESET)
		default:
			c.readable, c.eof = c.failed, true // a reset that came with the end is told next
			return 0, io.EOF
		}
	}
	return 0, ErrAgain
}

// received notes that n bytes have come, of at most size, or the urgent one.
func (c *Conn) received(n, size int, urgent bool) {
	switch c.urgent = urgent; {
	case urgent:
		c.urgency, c.look = false, true // there may be another one, which was not announced yet
	case n == size:
		c.look = true // the same
	case !c.hup && !c.urgency:
		c.readable = false
	}
}

// Urgent reports whether the last TryRecv or Recv received a byte of urgent data.
func (c *Conn) Urgent() bool { return c.urgent }

// Readable reports whether there may be something for TryRecv.
func (c *Conn) Readable() bool { return c.readable }

// Ending reports, after a TryRecv that had more room than it received, whether the next one will tell of the end of the stream.
func (c *Conn) Ending() bool { return c.readable && c.hup && !c.urgency }

// Failure is why the connection has failed, or that it is closed; nil if it is well.
func (c *Conn) Failure() error {
	switch {
	case c.closed:
		return c.gone()
	case !c.failed:
		return nil
	}
	c.told = true
	errno, err := unix.GetsockoptInt(int(c.fd), unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil || errno == 0 {
		errno = int(unix.ECONNRESET) // somebody else was told
	}
	return os.NewSyscallError("read", unix.Errno(errno))
}

// Recv waits for input, and receives it as TryRecv does; after the end of the peer's stream, io.EOF each time.
func (c *Conn) Recv(p []byte) (int, error) {
	for {
		n, err := c.TryRecv(p)
		if err != ErrAgain {
			return n, err
		}
		if c.eof {
			return 0, io.EOF
		}
		if err := c.WaitInput(); err != nil {
			return 0, err
		}
	}
}

// WaitInput waits until there may be something for TryRecv. Whoever calls it holds no buffer.
func (c *Conn) WaitInput() error {
	if c.readable || c.closed || c.expired || c.failed {
		return nil // TryRecv tells
	}
	return c.wait(&c.reader)
}

// wait parks the coroutine in the place of the reader or writer.
func (c *Conn) wait(place **coroutine) error {
	if c.expired {
		c.expired = false
		return ErrTimeout
	}
	if *place != nil {
		panic("loop: two wait for the same of a connection")
	}
	co := c.loop.here()
	*place = co
	err := co.wait(c)
	*place = nil
	if c.closed {
		return c.gone()
	}
	return err
}

// Send sends all of p, and waits while the peer does not take it. It returns how much was sent.
func (c *Conn) Send(p []byte) (int, error) { return c.send(p, 0) }

// SendMore is Send for what will be followed at once, by more, or by CloseWrite or Close: they share a packet.
func (c *Conn) SendMore(p []byte) (int, error) { return c.send(p, unix.MSG_MORE) }

// SendUrgent is Send of one byte as urgent data. Of more, the last that goes at a time is urgent.
func (c *Conn) SendUrgent(p []byte) (int, error) { return c.send(p, unix.MSG_OOB) }

// SendBuffer is Send, or SendMore, of the first n bytes of what Loop.Buffer has lent, and gives the buffer back, as soon as it can be
// spared: a peer that does not take little makes us hold little.
func (c *Conn) SendBuffer(b []byte, n int, more bool) (int, error) {
	flags := 0
	if more {
		flags = unix.MSG_MORE
	}
	sent, err := c.trySend(b[:n], flags)
	rest := b[sent:n]
	if err != nil || len(rest) == 0 {
		c.loop.Release(b)
		return sent, err
	}
	if len(rest) <= len(b)/2 {
		rest = bytes.Clone(rest)
		c.loop.Release(b)
	} else {
		defer c.loop.Release(b)
	}
	n, err = c.send(rest, flags)
	return sent + n, err
}

func (c *Conn) send(p []byte, flags int) (sent int, err error) {
	for {
		n, err := c.trySend(p[sent:], flags)
		sent += n
		if err != nil || sent == len(p) {
			return sent, err
		}
		if err := c.waitRoom(); err != nil {
			return sent, err
		}
	}
}

// trySend sends as much as goes.
func (c *Conn) trySend(p []byte, flags int) (sent int, err error) {
	if c.closed {
		return 0, c.gone()
	}
	for sent < len(p) {
		n, errno := send(c.fd, p[sent:], flags)
		switch errno {
		case 0:
			sent += n
		case unix.EINTR:
		case unix.EAGAIN:
			return sent, nil
		default:
			c.told = true
			return sent, os.NewSyscallError("write", errno)
		}
	}
	return sent, nil
}

// waitRoom waits until there may be room for a send that has just found none.
func (c *Conn) waitRoom() error {
	if !c.pushes {
		c.pushes = true
		if errno := c.register(unix.EPOLL_CTL_MOD, unix.EPOLLOUT); errno != 0 {
			return os.NewSyscallError("epoll_ctl", errno)
		}
	}
	return c.wait(&c.writer)
}

// CloseWrite ends our stream towards the peer; the peer's goes on.
func (c *Conn) CloseWrite() error {
	if c.closed {
		return c.gone()
	}
	if errno := shutdownWrite(c.fd); errno != 0 {
		return os.NewSyscallError("shutdown", errno)
	}
	return nil
}

// Close ends the connection: what is still on its way to the peer is delivered. Whoever waits for the connection is woken with
// net.ErrClosed.
func (c *Conn) Close() {
	c.due = false
	if !c.closed {
		setLinger(c.fd, false)
		c.close()
	}
}

// Abort resets the connection: the peer sees ECONNRESET, and what is still on its way is dropped.
func (c *Conn) Abort() {
	c.due = false
	if !c.closed {
		c.close() // SO_LINGER{1,0} is on
	}
}

// abort is Abort by somebody whom the handler does not know of: it is told.
func (c *Conn) abort() {
	c.aborted = true
	c.due = c.running == nil || !c.running.parked // else close tells it
	c.close()
	c.activate()
}

func (c *Conn) close() {
	c.closed = true
	closeDescriptor(c.fd)
	if c.deadline != nil {
		c.loop.wheel.stop(&c.deadline.timer)
	}
	c.loop.leave(c)
	c.loop.group.roomAgain()
	for _, co := range [...]*coroutine{c.reader, c.writer, c.running} {
		if co != nil {
			co.wake(c.gone())
		}
	}
}

// deadline is that of a connection.
type deadline struct {
	timer
	conn *Conn
}

// SetDeadline bounds how long the connection may be waited for: when it has passed, the next wait or TryRecv fails with ErrTimeout,
// once, and the handler of an idle one is called. 0 is none. It costs next to nothing to put it off again and again. It may be met
// late, by an eighth of the time and 17 ms.
func (c *Conn) SetDeadline(t Time) {
	c.expired = false
	if c.closed || t == 0 && c.deadline == nil {
		return
	}
	if c.deadline == nil {
		c.deadline = &deadline{conn: c}
		c.deadline.owner = c.deadline
	}
	if t == 0 {
		c.deadline.timer.deadline = 0 // its slot will find out
		return
	}
	c.loop.wheel.set(&c.deadline.timer, t, c.loop.now)
}

func (d *deadline) fire() {
	c := d.conn
	c.expired = true
	switch {
	case c.reader != nil:
		c.reader.wake(nil)
	case c.writer != nil:
		c.writer.wake(nil)
	default:
		c.activate()
	}
}

// Control calls f with the descriptor, for options of the socket. f must not keep or close it, nor wait.
func (c *Conn) Control(f func(fd int) error) error {
	if c.closed {
		return c.gone()
	}
	return f(int(c.fd))
}

// Local is the address of our end; the zero value if the connection is closed.
func (c *Conn) Local() netip.AddrPort { return c.address(unix.SYS_GETSOCKNAME) }

// Remote is the address of the peer's end; the zero value if the connection was reset or is closed.
func (c *Conn) Remote() netip.AddrPort { return c.address(unix.SYS_GETPEERNAME) }

func (c *Conn) address(call uintptr) netip.AddrPort {
	if c.closed {
		return netip.AddrPort{}
	}
	return address(call, c.fd)
}
