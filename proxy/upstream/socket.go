// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/pillionproxy/pillion/proxy/listen"
	"github.com/pillionproxy/pillion/proxy/loop"
	"github.com/pillionproxy/pillion/proxy/telemetry"
	"golang.org/x/sys/unix"
)

// plan is what a dial is to be.
type plan struct {
	source      netip.Addr // with its zone
	destination netip.AddrPort
	ports       *ports
	mark        uint32
	device      int           // index, 0: none
	transparent bool          // source need not be an address of this host
	captured    chan struct{} // see own.add
}

// portsAtOnce is how many ports are tried until others have their turn: a range may have 64 Ki.
const portsAtOnce = 16

// dial tries port after port, each with a socket of its own, until one is free towards the destination or the connect
// timeout has passed. Its errors are of type *Error.
func (d *Dialer) dial(l *loop.Loop, p plan) (*Conn, error) {
	deadline := l.Now().Add(d.timeout)
	for tried := range p.ports.Len() {
		port := p.ports.next()
		if p.source == p.destination.Addr() && port == p.destination.Port() {
			continue // it would connect to itself
		}
		conn, err := d.attempt(l, p, netip.AddrPortFrom(p.source, port), deadline)
		switch {
		case err == nil:
			return conn, nil
		case isCall(err, "bind") && errors.Is(err, unix.EADDRNOTAVAIL) && !p.transparent:
			// Never a matter of the port. An app that is bound to a foreign address (IP_FREEBIND, or a transparent proxy
			// itself) is dialled for from that address.
			p.transparent = true
		case errors.Is(err, unix.EADDRINUSE), isCall(err, "connect") && errors.Is(err, unix.EADDRNOTAVAIL):
			if tried%portsAtOnce != portsAtOnce-1 {
				continue
			}
			if err := l.Yield(); err != nil {
				return nil, &Error{reason(err), err}
			}
			if l.Now() > deadline {
				return nil, &Error{telemetry.UpstreamConnectTimeout, err}
			}
		default:
			return nil, &Error{reason(err), err}
		}
	}
	return nil, &Error{telemetry.PortsExhausted, fmt.Errorf("every port of %s is in use from %s to %s", p.ports, p.source, p.destination)}
}

// attempt makes one socket and connects it.
func (d *Dialer) attempt(l *loop.Loop, p plan, local netip.AddrPort, deadline loop.Time) (*Conn, error) {
	entry := d.own.add(local, p.destination, p.captured) // before the SYN: the accept may come before connect returns
	if entry == nil {
		return nil, os.NewSyscallError("bind", unix.EADDRINUSE)
	}
	conn, err := l.Dial(loop.Dial{
		Remote: p.destination, Local: local, Until: deadline,
		Bound: func(fd int) error { return d.options(fd, p) },
	})
	if err != nil {
		entry.forget()
		if entry.wasFound() { // and reset before connect returned
			return nil, ErrCaptured
		}
		return nil, err
	}
	return &Conn{Conn: conn, local: local, entry: entry}, nil
}

// options sets the options of a dial, all of which must be there before bind.
func (d *Dialer) options(fd int, p plan) error {
	if p.mark != 0 {
		err := listen.SetOption(fd, "SO_MARK", unix.SOL_SOCKET, unix.SO_MARK, int(p.mark))
		switch {
		case errors.Is(err, unix.EPERM):
			// Before Linux 5.17 it takes CAP_NET_ADMIN. Our own marks the capture sets by itself, inside the captured cgroup.
			d.noMark.Do(func() {
				d.log.Warn("cannot set packet marks: dials for an app that sets SO_MARK go out without it", "error", err)
			})
		case err != nil:
			return err
		}
	}
	// The same port may be used towards many destinations, and while an earlier connection of it is in TIME_WAIT.
	if err := listen.SetOption(fd, "SO_REUSEADDR", unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if p.transparent {
		if err := listen.SetTransparent(fd, p.source.Is6()); err != nil {
			return err
		}
	}
	if p.device != 0 {
		if err := listen.SetOption(fd, "SO_BINDTOIFINDEX", unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, p.device); err != nil {
			return err
		}
	}
	return listen.SetKeepalive(fd)
}

// isCall reports whether err came from the system call.
func isCall(err error, call string) bool {
	s, ok := errors.AsType[*os.SyscallError](err)
	return ok && s.Syscall == call
}

// bare takes the addresses from an error of package net: whoever reports a dial has them beside it.
func bare(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return op.Err
	}
	return err
}

// reason classifies the error of a dial.
func reason(err error) telemetry.Reason {
	var timeout interface{ Timeout() bool }
	switch {
	case errors.Is(err, ErrCaptured):
		return telemetry.OwnDialCaptured
	case errors.Is(err, context.Canceled):
		return telemetry.Shutdown
	case errors.Is(err, unix.ECONNREFUSED):
		return telemetry.UpstreamConnectRefused
	case errors.Is(err, unix.ECONNRESET):
		return telemetry.UpstreamReset
	case errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.ENETDOWN),
		errors.Is(err, unix.EHOSTDOWN), errors.Is(err, unix.EACCES), errors.Is(err, unix.ENODEV),
		isCall(err, "connect") && errors.Is(err, unix.EPERM):
		// EACCES: a `prohibit` route or an ICMP of that kind; EPERM: a firewall here; ENODEV: the device is gone.
		return telemetry.UpstreamUnreachable
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		return telemetry.ConnectionLimit
	case errors.As(err, &timeout) && timeout.Timeout():
		return telemetry.UpstreamConnectTimeout
	default:
		return telemetry.InternalError
	}
}
