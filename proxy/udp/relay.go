// SPDX-License-Identifier: Apache-2.0

// Package udp relays datagrams, flow by flow: those that a client sends to one address, and what comes back from there.
//
// What always holds: a flow has one socket towards whom the client meant, from the client's own address where the host has it,
// and one in that one's name towards the client; flows are bounded, and each ends when nothing has passed for a while, or
// when either side refuses. A datagram is passed on whole or not at all, and nothing is held back. A flow that waits holds no
// buffer.
package udp

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// idle ends a flow on which nothing has passed (RFC 4787 §4.3 wants two minutes at least; a question and its answer, as of DNS,
	// are done long before).
	idle     = 2 * time.Minute
	idleOnce = 30 * time.Second // after a single answer
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
	log       *slog.Logger

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

// flow is one of them. used is when something passed, answers how often it came back.
type flow struct {
	key
	out      *net.UDPConn // towards whom the client meant
	back     *net.UDPConn // towards the client
	used     atomic.Int64 // Unix nanoseconds
	answered atomic.Int64
}

// New takes over listeners, which tell for whom each datagram was (IP_RECVORIGDSTADDR).
func New(files []*os.File, side Side, log *slog.Logger) (*Relay, error) {
	r := &Relay{side: side, log: log, flows: make(map[key]*flow), most: mostFlows()}
	for _, f := range files {
		conn, err := net.FilePacketConn(f)
		_ = f.Close()
		if err != nil {
			r.closeListeners()
			return nil, err
		}
		r.listeners = append(r.listeners, conn.(*net.UDPConn))
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
	r.closeListeners()
	r.mu.Lock()
	r.closed = true
	for _, f := range r.flows {
		f.close()
	}
	r.mu.Unlock()
	r.work.Wait()
}

func (r *Relay) closeListeners() {
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
			r.log.Debug("a datagram was dropped", "source", k.client, "destination", k.meant, "error", err)
			r.refuse(k, err)
			continue
		}
		f.send(f.out, b[:n])
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
		return nil, net.ErrClosed
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
	f := &flow{key: k, out: out, back: back}
	f.touch()
	r.flows[k] = f
	r.work.Go(func() { r.carry(f, out, back, true) })
	r.work.Go(func() { r.carry(f, back, out, false) })
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
		oldest.close()
	}
}

// dial opens the socket towards whom the client meant, from the client's address where this host has it.
func dial(k key) (*net.UDPConn, error) {
	local := net.UDPAddrFromAddrPort(netip.AddrPortFrom(k.client.Addr(), 0))
	conn, err := net.DialUDP("udp", local, net.UDPAddrFromAddrPort(k.meant))
	if errors.Is(err, unix.EADDRNOTAVAIL) {
		return net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(k.meant))
	}
	return conn, err
}

// carry passes on what comes from one side until the flow is idle or closed.
func (r *Relay) carry(f *flow, from, to *net.UDPConn, answers bool) {
	defer r.end(f)
	raw, err := from.SyscallConn()
	if err != nil {
		return // closed
	}
	for {
		_ = from.SetReadDeadline(time.Now().Add(f.left()))
		err := readOnce(raw, func(b []byte) {
			if answers {
				f.answered.Add(1)
			}
			f.send(to, b)
		})
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if f.left() <= 0 {
				return
			}
			continue
		case err != nil: // closed, or refused
			if answers {
				r.refuse(f.key, err)
			}
			return
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

// refuse passes on that a datagram was refused.
func (r *Relay) refuse(k key, err error) {
	switch errno, ok := errors.AsType[unix.Errno](err); {
	case ok && (errno == unix.ECONNREFUSED || errno == unix.EHOSTUNREACH || errno == unix.ENETUNREACH || errno == unix.EACCES):
		r.side.Refuse(k.meant, k.client, errno)
	}
}

func (f *flow) send(to *net.UDPConn, b []byte) {
	f.touch()
	_, _ = to.Write(b) // a datagram may be lost; that the other side refuses is told to the reader of this socket
}

func (f *flow) touch() { f.used.Store(time.Now().UnixNano()) }

// left is how long the flow may still be idle.
func (f *flow) left() time.Duration {
	most := idle
	if f.answered.Load() == 1 {
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
