// SPDX-License-Identifier: Apache-2.0

package listen

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// bufferSize is how much is read at once, and all that this process holds of a direction; in bulk a pipe holds more, in the kernel.
const bufferSize = 64 << 10

// buffers lends read buffers to the connections that have input just now. A connection that waits holds none.
var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// Conn is one side of a relayed connection: accepted, or dialled by package upstream.
//
// Recv and Release belong to one goroutine, TrySend, Send and CloseWrite to one (maybe another). Watch may be used while
// no Recv is under way. Abort may be called by anyone at any time and ends whatever is waiting.
type Conn struct {
	tcp           *net.TCPConn
	raw           syscall.RawConn
	local, remote netip.AddrPort // local: of an accepted connection, its destination
	redirected    bool           // local is not the socket's own address
	v6            bool

	in  input
	out output
	// told is set when a send was told of a reset, sending while the system call of a send is under way: see wasReset.
	told, sending atomic.Bool
	// tryRecv and trySend, made once: a closure for every call would be an allocation for every call.
	recvOnce, sendOnce func(fd uintptr) bool
}

// input is the state of a Recv, and output that of a TrySend, while the callback of the descriptor runs.
type input struct {
	buf    *[bufferSize]byte
	n      int
	urgent bool
	err    error
}

type output struct {
	data   []byte
	urgent bool
	n      int
	err    error
}

// NewConn takes over a connection; after it the caller never touches tcp again. The options of SetCommon must be set.
func NewConn(tcp *net.TCPConn) (*Conn, error) {
	raw, err := tcp.SyscallConn()
	if err != nil {
		return nil, err
	}
	c := &Conn{tcp: tcp, raw: raw, local: addrPort(tcp.LocalAddr()), remote: addrPort(tcp.RemoteAddr())}
	c.v6 = c.local.Addr().Is6()
	c.recvOnce, c.sendOnce = c.tryRecv, c.trySend
	return c, nil
}

func addrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok { // a connection that was reset may have lost its address
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// Local is our end's address: of an accepted connection, the address that its client meant.
func (c *Conn) Local() netip.AddrPort { return c.local }

// Redirected reports whether that is not the address of the socket: the capture has rewritten it.
func (c *Conn) Redirected() bool { return c.redirected }

// Remote is the other end's address: of an accepted connection, its true client. Of a redirected one the port may be another:
// connection tracking changes it where the client has two connections that would look alike to us.
func (c *Conn) Remote() netip.AddrPort { return c.remote }

// Mark is the packet mark of the socket: of an accepted one, the mark with which its SYN was given to us.
func (c *Conn) Mark() (mark uint32) {
	_ = c.raw.Control(func(fd uintptr) { // an error means closed; whoever uses the connection next will meet it
		v, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK)
		if err == nil {
			mark = uint32(v)
		}
	})
	return mark
}

// Device is the index of the device to which the client's socket is bound, 0 if to none. An unbound socket's SYN comes in
// by lo (index 1 in every network namespace); that of a bound one, by that device. Towards an address of this host
// nothing can be told: the kernel names the device that has the address, and the dial must not be bound to it. A redirected
// connection is never that of a bound socket, whose SYN could not get to lo.
func (c *Conn) Device() (index int) {
	if c.redirected {
		return 0
	}
	_ = c.raw.Control(func(fd uintptr) { index = arrivalDevice(int(fd), c.v6) })
	if index <= 1 || IsOwn(c.local.Addr()) {
		return 0
	}
	return index
}

// Recv waits for input and returns it; io.EOF when the peer has ended its stream. If urgent, it is the one byte that the
// peer sent as urgent data. The data is valid until Release, which must follow before the next Recv.
func (c *Conn) Recv() (data []byte, urgent bool, err error) {
	c.in = input{}
	if err := c.raw.Read(c.recvOnce); err != nil {
		return nil, false, bare(err)
	}
	switch {
	case c.in.err != nil:
		return nil, false, os.NewSyscallError("read", c.in.err)
	case c.in.n == 0 && c.wasReset():
		return nil, false, os.NewSyscallError("read", unix.ECONNRESET)
	case c.in.n == 0:
		return nil, false, io.EOF
	}
	return c.in.buf[:c.in.n], c.in.urgent, nil
}

// wasReset tells, after a read that returned nothing, a reset from the end of the peer's stream. The kernel tells of a reset
// once. If it has told a send, a read sees an end, which must not be passed on as one.
func (c *Conn) wasReset() bool {
	for c.sending.Load() { // it may have been told, and has not said so yet
		runtime.Gosched()
	}
	return c.told.Load()
}

// tryRecv holds a buffer only if there was something to read.
//
// A read stops before the urgent byte, and SIOCATMARK tells that it comes next. An urgent byte that arrives between the
// two calls, on a socket that was empty, is read with what follows it: no byte is lost, but its urgency is.
func (c *Conn) tryRecv(fd uintptr) bool {
	buf := buffers.Get().(*[bufferSize]byte)
	p := buf[:]
	at, err := unix.IoctlGetUint32(int(fd), unix.SIOCATMARK)
	c.in.urgent = err == nil && at == 1
	if c.in.urgent {
		p = buf[:1]
	}
	for {
		c.in.n, c.in.err = unix.Read(int(fd), p)
		if c.in.err != unix.EINTR && (c.in.err != unix.EAGAIN || !putOff(fd)) {
			break
		}
	}
	if c.in.n > 0 {
		c.in.buf = buf
		return true
	}
	buffers.Put(buf)
	return c.in.err != unix.EAGAIN
}

// putOff reports whether a read that found nothing has to be tried again. At the urgent byte, a read says EAGAIN while a
// signal is pending, whatever there is to read (tcp_recvmsg_locked in net/ipv4/tcp.c), and Go's scheduler sends signals all
// the time. Nothing would wake us a second time for what is there already.
func putOff(fd uintptr) bool {
	if at, err := unix.IoctlGetUint32(int(fd), unix.SIOCATMARK); err != nil || at == 0 {
		return false
	}
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(p, 0)
	return err == unix.EINTR || n > 0
}

// Release gives back what Recv returned.
func (c *Conn) Release() {
	if c.in.buf != nil {
		buffers.Put(c.in.buf)
		c.in.buf = nil
	}
}

// TrySend sends as much as goes without waiting and returns how much that was.
func (c *Conn) TrySend(data []byte, urgent bool) (int, error) {
	c.out = output{data: data, urgent: urgent}
	err := c.raw.Write(c.sendOnce)
	n := c.out.n
	if err == nil && c.out.err != unix.EAGAIN {
		err = os.NewSyscallError("write", c.out.err)
	}
	c.out = output{}
	return n, bare(err)
}

// trySend makes one attempt and does not wait for another.
func (c *Conn) trySend(fd uintptr) bool {
	flags := unix.MSG_NOSIGNAL
	if c.out.urgent {
		flags |= unix.MSG_OOB
	}
	c.sending.Store(true)
	defer c.sending.Store(false)
	for {
		n, err := unix.SendmsgN(int(fd), c.out.data, nil, nil, flags)
		if err == unix.EINTR {
			continue
		}
		if err != nil && err != unix.EAGAIN {
			c.told.Store(true)
		}
		c.out.n, c.out.err = max(n, 0), err
		return true
	}
}

// Send sends all of data, waiting while the peer does not take it. It returns how much was sent.
func (c *Conn) Send(data []byte, urgent bool) (sent int, err error) {
	c.out = output{data: data, urgent: urgent}
	defer func() { c.out = output{} }()
	err = c.raw.Write(func(fd uintptr) bool {
		for len(c.out.data) > 0 {
			c.trySend(fd)
			sent += c.out.n
			c.out.data = c.out.data[c.out.n:]
			if c.out.err != nil {
				return c.out.err != unix.EAGAIN
			}
		}
		return true
	})
	if err == nil {
		err = os.NewSyscallError("write", c.out.err)
	}
	return sent, bare(err)
}

// CloseWrite ends our stream towards the peer; the peer's goes on.
func (c *Conn) CloseWrite() error { return bare(c.tcp.CloseWrite()) }

// bare takes the addresses from an error of package net: whoever reports a connection's error has them beside it.
func bare(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return op.Err
	}
	return err
}

// Close ends a connection of which both streams have ended: what is still on its way is delivered.
func (c *Conn) Close() error {
	_ = c.raw.Control(func(fd uintptr) { _ = setLinger(int(fd), false) }) // fails only if it is closed already
	return c.tcp.Close()
}

// Abort resets the connection: the peer sees ECONNRESET, and what is still on its way is dropped.
func (c *Conn) Abort() { _ = c.tcp.Close() } // SO_LINGER{1,0} is on; an error means that it was closed before

// Watch calls gone, at most once and from a goroutine of its own, when the peer has reset the connection or stopped
// answering. The end of the peer's stream is no such thing. It is for when nobody reads: the one who reads is told
// anyway. stop ends the watch and waits for its goroutine, so gone must not wait for whoever calls stop.
func (c *Conn) Watch(gone func(error)) (stop func()) {
	done := make(chan struct{})
	go c.watch(gone, done)
	return func() {
		_ = c.tcp.SetReadDeadline(time.Unix(1, 0)) // wakes it; an error means closed, which wakes it too
		<-done
		_ = c.tcp.SetReadDeadline(time.Time{})
	}
}

func (c *Conn) watch(gone func(error), done chan<- struct{}) {
	defer close(done)
	var cause error
	err := c.raw.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd)}}
		if n, err := unix.Poll(p, 0); err != nil || n == 0 || p[0].Revents&unix.POLLERR == 0 {
			return false // input, or an end: wait on
		}
		errno, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil || errno == 0 {
			return false // somebody else was told of it
		}
		cause = os.NewSyscallError("watch", syscall.Errno(errno))
		return true
	})
	if err == nil {
		gone(cause)
	}
}
