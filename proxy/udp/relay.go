// SPDX-License-Identifier: Apache-2.0

// Package udp relays datagrams, flow by flow: those that a client sends to one address, and what comes back from there.
//
// What always holds: a flow has one socket towards whom the client meant, from the client's own address where the host has it,
// and one in that one's name towards the client; flows are bounded, and each ends when nothing has passed for a while, or
// when the client is gone. A datagram is passed on whole or not at all, and nothing is held back; that one was refused is passed
// on, and ends nothing. A flow that waits holds no buffer.
package udp

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/pillionproxy/pillion/proxy/telemetry"
	"golang.org/x/sys/unix"
)

const (
	// idle ends a flow on which nothing has passed (RFC 4787 §4.3 wants two minutes at least; a question and its answer, as of DNS,
	// are done long before).
	idle     = 2 * time.Minute
	idleOnce = 30 * time.Second // after a single answer, or refusals alone
	// maxFlows bounds the flows of a relay: each has two descriptors. A new one ends the one that has been idle for longest.
	maxFlows = 4096
	// maxDatagram is more than a datagram of either family can carry without jumbograms (RFC 768, RFC 2675).
	maxDatagram = 64 << 10
)

// Side is where the clients are.
type Side interface {
	// Answer opens a socket in the name of an address that a client asked, connected to the client.
	Answer(meant, client netip.AddrPort) (*net.UDPConn, error)
	// Refuse tells the client by ICMP that nobody is there: with ECONNREFUSED no port, else no host.
	Refuse(meant, client netip.AddrPort, why unix.Errno)
}

// Relay carries the datagrams that come to its listeners.
type Relay struct {
	listeners []*net.UDPConn
	side      Side
	book      *telemetry.Book

	mu     sync.Mutex
	flows  map[key]*flow
	most   int  // of them
	closed bool // no flow begins any more
	work   sync.WaitGroup
}

// buffers lends what a datagram is read into.
var buffers = sync.Pool{New: func() any { return new([maxDatagram]byte) }}

// key names a flow.
type key struct{ client, meant netip.AddrPort }

// flow is one of them.
type flow struct {
	key
	out      *net.UDPConn // towards whom the client meant
	back     *net.UDPConn // towards the client
	record   *telemetry.Record
	used     atomic.Int64   // when something passed, in Unix nanoseconds
	answered atomic.Int64   // how often something came back
	refusal  atomic.Uintptr // of the last datagram that was refused, a unix.Errno; 0: none was
	evicted  atomic.Bool
}

var (
	errEvicted = errors.New("ended to make room for a new flow: as many as may be were open")
	errClosed  = errors.New("the relay has ended")
)

// New takes over listeners, which tell for whom each datagram was (IP_RECVORIGDSTADDR), also when it fails. Flows are entered in
// the book.
func New(files []*os.File, side Side, book *telemetry.Book) (*Relay, error) {
	r := &Relay{side: side, book: book, flows: make(map[key]*flow), most: mostFlows()}
	var failed error
	for _, f := range files {
		conn, err := net.FilePacketConn(f)
		_ = f.Close()
		if err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		r.listeners = append(r.listeners, conn.(*net.UDPConn))
	}
	if failed != nil {
		r.Close()
		return nil, failed
	}
	return r, nil
}

// mostFlows leaves most descriptors of this process to connections.
func mostFlows() int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return maxFlows
	}
	return max(1, int(min(limit.Cur/8, maxFlows)))
}

// Serve relays until ctx is done, and returns when nothing of the relay is left.
func (r *Relay) Serve(ctx context.Context) {
	for _, l := range r.listeners {
		r.work.Go(func() { r.receive(l) })
	}
	<-ctx.Done()
	r.Close()
	r.mu.Lock()
	r.closed = true
	for _, f := range r.flows {
		f.close()
	}
	r.mu.Unlock()
	r.work.Wait()
}

// Close closes the listeners of a relay that is not served.
func (r *Relay) Close() {
	for _, l := range r.listeners {
		_ = l.Close() // fails only if it was closed before
	}
}

// receive takes the first datagrams of flows: later ones come to the socket that answers.
func (r *Relay) receive(l *net.UDPConn) {
	b, control := make([]byte, maxDatagram), make([]byte, 256)
	for {
		n, cn, _, from, err := l.ReadMsgUDPAddrPort(b, control)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // of one datagram
		}
		meant, ok := meantFor(control[:cn])
		if !ok {
			continue
		}
		k := key{netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), meant}
		f, err := r.flow(k)
		if err != nil {
			r.book.Open(telemetry.UDP, telemetry.Outbound, k.client, k.meant).Close(reason(err), err)
			if errno, ok := refusal(err); ok {
				r.side.Refuse(meant, k.client, errno)
			}
			continue
		}
		r.send(f, b[:n])
	}
}

// flow finds a flow, or begins it.
func (r *Relay) flow(k key) (*flow, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if f := r.flows[k]; f != nil {
		return f, nil
	}
	if r.closed { // the datagram came while the listeners were closed
		return nil, errClosed
	}
	if len(r.flows) >= r.most {
		r.evict()
	}
	out, err := dial(k)
	if err != nil {
		return nil, err
	}
	back, err := r.side.Answer(k.meant, k.client)
	if err != nil {
		_ = out.Close()
		return nil, err
	}
	f := &flow{key: k, out: out, back: back, record: r.book.Open(telemetry.UDP, telemetry.Outbound, k.client, k.meant)}
	f.record.Dialled(out.LocalAddr().(*net.UDPAddr).AddrPort(), 0)
	f.touch()
	r.flows[k] = f
	r.work.Go(func() { r.carry(f) })
	return f, nil
}

// evict ends the flow that has been idle for longest. r.mu is held.
func (r *Relay) evict() {
	var oldest *flow
	for _, f := range r.flows {
		if oldest == nil || f.used.Load() < oldest.used.Load() {
			oldest = f
		}
	}
	if oldest != nil {
		delete(r.flows, oldest.key)
		oldest.evicted.Store(true)
		oldest.close()
	}
}

// dial opens the socket towards whom the client meant, from the client's address where this host has it. It is told every ICMP
// error, as a client may be that asks for it (ip(7)): else a host that is not there is silence.
func dial(k key) (*net.UDPConn, error) {
	d := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(netip.AddrPortFrom(k.client.Addr(), 0)), Control: tellErrors}
	conn, err := d.Dial("udp", k.meant.String())
	if errors.Is(err, unix.EADDRNOTAVAIL) {
		d.LocalAddr = nil
		conn, err = d.Dial("udp", k.meant.String())
	}
	if err != nil {
		return nil, err
	}
	return conn.(*net.UDPConn), nil
}

func tellErrors(network, _ string, c syscall.RawConn) (err error) {
	level, opt := unix.SOL_IP, unix.IP_RECVERR
	if network == "udp6" {
		level, opt = unix.SOL_IPV6, unix.IPV6_RECVERR
	}
	cerr := c.Control(func(fd uintptr) { err = os.NewSyscallError("setsockopt", unix.SetsockoptInt(int(fd), level, opt, 1)) })
	return errors.Join(cerr, err)
}

// carry carries a flow to its end.
func (r *Relay) carry(f *flow) {
	var answers sync.WaitGroup
	answers.Go(func() { r.answers(f) })
	r.questions(f)
	answers.Wait()
	switch refused := unix.Errno(f.refusal.Load()); {
	case f.evicted.Load():
		f.record.Close(telemetry.ConnectionLimit, errEvicted)
	case refused != 0 && f.answered.Load() == 0:
		f.record.Close(reason(refused), refused)
	default:
		f.record.Close(telemetry.OK, nil)
	}
}

// reason classifies why a datagram was not carried.
func reason(err error) telemetry.Reason {
	switch errno, refused := refusal(err); {
	case errno == unix.ECONNREFUSED:
		return telemetry.UpstreamConnectRefused
	case refused:
		return telemetry.UpstreamUnreachable
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		return telemetry.ConnectionLimit
	case errors.Is(err, errClosed):
		return telemetry.Shutdown
	}
	return telemetry.InternalError
}

// questions passes on what the client sends, until the flow is idle or closed, or the client gone.
func (r *Relay) questions(f *flow) {
	defer r.end(f)
	for {
		if err := f.next(f.back, func(b []byte) { r.send(f, b) }); err != nil {
			return
		}
	}
}

// answers passes on what comes back, and that nothing will, until the flow is idle or closed.
func (r *Relay) answers(f *flow) {
	defer r.end(f)
	for {
		err := f.next(f.out, func(b []byte) {
			f.touch()
			f.answered.Add(1)
			n, _ := f.back.Write(b) // a datagram may be lost; that the client is gone is told to questions
			f.record.Received.Add(uint64(n))
		})
		if err != nil && !r.refused(f, err) {
			return
		}
	}
}

// send sends what the client sent. An error that waits on the socket is of an earlier datagram.
func (r *Relay) send(f *flow, b []byte) {
	f.touch()
	n, err := f.out.Write(b)
	if err != nil && r.refused(f, err) {
		n, _ = f.out.Write(b) // a datagram may be lost
	}
	f.record.Sent.Add(uint64(n))
}

// refused passes on that a datagram of a flow was refused, if that is what the error says. First its report is dropped: of a refusal
// after that the socket tells again.
func (r *Relay) refused(f *flow, err error) bool {
	forget(f.out)
	errno, ok := refusal(err)
	if ok {
		r.side.Refuse(f.meant, f.client, errno)
		f.refusal.Store(uintptr(errno))
	}
	return ok
}

// refusal is the error number of an error that says that nobody takes a datagram.
func refusal(err error) (unix.Errno, bool) {
	errno, ok := errors.AsType[unix.Errno](err)
	return errno, ok && slices.Contains([]unix.Errno{unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EACCES}, errno)
}

// forget drops the reports of errors, which else fill the room of datagrams (MSG_ERRQUEUE in recv(2)).
func forget(conn *net.UDPConn) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return // closed
	}
	_ = raw.Control(func(fd uintptr) {
		for err := error(nil); err == nil; {
			_, _, _, _, err = unix.Recvmsg(int(fd), nil, nil, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		}
	})
}

// next waits for a datagram and lends it to then. It fails with os.ErrDeadlineExceeded when the flow is idle.
func (f *flow) next(from *net.UDPConn, then func([]byte)) error {
	raw, err := from.SyscallConn()
	if err != nil {
		return err
	}
	for {
		left := f.left()
		if left <= 0 {
			return os.ErrDeadlineExceeded
		}
		_ = from.SetReadDeadline(time.Now().Add(left))
		if err := readOnce(raw, then); !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
	}
}

// readOnce waits for a datagram and lends it to then.
func readOnce(raw syscall.RawConn, then func([]byte)) error {
	var failed error
	err := raw.Read(func(fd uintptr) bool {
		b := buffers.Get().(*[maxDatagram]byte)
		defer buffers.Put(b)
		n, err := unix.Read(int(fd), b[:])
		for errors.Is(err, unix.EINTR) {
			n, err = unix.Read(int(fd), b[:])
		}
		if errors.Is(err, unix.EAGAIN) {
			return false
		}
		if failed = err; err == nil {
			then(b[:n])
		}
		return true
	})
	return errors.Join(err, failed)
}

func (f *flow) touch() { f.used.Store(time.Now().UnixNano()) }

// left is how long the flow may still be idle.
func (f *flow) left() time.Duration {
	most := idle
	if n := f.answered.Load(); n == 1 || n == 0 && f.refusal.Load() != 0 {
		most = idleOnce
	}
	return most - time.Since(time.Unix(0, f.used.Load()))
}

func (f *flow) close() {
	_ = f.out.Close()
	_ = f.back.Close()
}

func (r *Relay) end(f *flow) {
	f.close()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.flows[f.key] == f {
		delete(r.flows, f.key)
	}
}

// meantFor is the address in the control messages of a datagram: a struct sockaddr (linux/udp.h, ip(7)).
func meantFor(control []byte) (netip.AddrPort, bool) {
	messages, err := syscall.ParseSocketControlMessage(control)
	if err != nil {
		return netip.AddrPort{}, false
	}
	for _, m := range messages {
		d := m.Data
		switch {
		case m.Header.Level == unix.SOL_IP && m.Header.Type == unix.IP_RECVORIGDSTADDR && len(d) >= unix.SizeofSockaddrInet4:
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte(d[4:8])), binary.BigEndian.Uint16(d[2:4])), true
		case m.Header.Level == unix.SOL_IPV6 && m.Header.Type == unix.IPV6_RECVORIGDSTADDR && len(d) >= unix.SizeofSockaddrInet6:
			return netip.AddrPortFrom(netip.AddrFrom16([16]byte(d[8:24])), binary.BigEndian.Uint16(d[2:4])), true
		}
	}
	return netip.AddrPort{}, false
}
