// SPDX-License-Identifier: Apache-2.0

// Package upstream makes the proxy's own connections: to where the app wanted to go, in the app's name, and to the app, in
// its client's name where the capture would bring the answers back, else in the app's own.
//
// What always holds: a dial goes out from the address of the one it is made for, by that one's device and with that one's
// packet mark, as far as the host allows; its port is of a range of the proxy's own, so that no port is taken that the
// app could have had; an outbound dial carries no mark of ours, since the host's routing rules must meet the app's alone;
// and every dial is remembered from before its SYN until it is closed, so that the proxy knows it again if the capture
// should give it back (Own).
package upstream

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/proxy/loop"
	"github.com/pillionproxy/pillion/proxy/telemetry"
	"golang.org/x/sys/unix"
)

// Client is an accepted connection as a dial for it needs it.
type Client interface {
	Remote() netip.AddrPort // who opened it
	Local() netip.AddrPort  // whom they meant
	Redirected() bool       // the capture rewrote the latter: it knows no mark, and the proxy by its user alone
	Mark() uint32
	Device() int
}

// Error is a dial that failed.
type Error struct {
	Reason telemetry.Reason
	Err    error
}

func (e *Error) Error() string { return e.Err.Error() }

func (e *Error) Unwrap() error { return e.Err }

// Dialer dials. It is used by all connections at once.
type Dialer struct {
	slot     config.Slot
	timeout  time.Duration
	outbound *ports
	inbound  *ports
	log      *slog.Logger
	own      own

	noMark, noClientName sync.Once // what is said once only
}

// New returns a dialer.
func New(cfg config.Proxy, log *slog.Logger) *Dialer {
	return &Dialer{
		slot:     cfg.Slot,
		timeout:  cfg.ConnectTimeout,
		outbound: &ports{PortRange: cfg.DialOutbound},
		inbound:  &ports{PortRange: cfg.DialInbound},
		log:      log,
	}
}

// Outbound dials for the app.
func (d *Dialer) Outbound(l *loop.Loop, c Client) (*Conn, error) {
	return d.dial(l, plan{
		source:      c.Remote().Addr(),
		destination: c.Local(),
		ports:       d.outbound,
		mark:        c.Mark() &^ d.slot.Mask(),
		device:      c.Device(),
	})
}

// Inbound dials the app in the name of its client, or, where the host does not let us, as InboundOwn does. Of a redirected
// connection the app's answers would go to the client itself, past us: it is dialled from the address that its client
// dialled, whatever the host would let us do.
func (d *Dialer) Inbound(l *loop.Loop, c Client) (*Conn, error) {
	if c.Redirected() {
		return d.dial(l, plan{source: c.Local().Addr(), destination: c.Local(), ports: d.inbound})
	}
	conn, err := d.dial(l, plan{
		source:      c.Remote().Addr(),
		destination: c.Local(),
		ports:       d.inbound,
		mark:        d.slot.Mark(config.RoleDial),
		transparent: true,
	})
	if !refusesSource(err) {
		return conn, err
	}
	d.noClientName.Do(func() {
		d.log.Warn("cannot dial the app in its client's name: the app will see this host's own address as its peer",
			"error", err, "source", c.Remote(), "destination", c.Local())
	})
	return d.InboundOwn(l, c)
}

// InboundOwn dials the app from the address that its client dialled. The ports are those of the outbound range: by a port
// of the inbound range the capture would take it for a dial in the client's name.
func (d *Dialer) InboundOwn(l *loop.Loop, c Client) (*Conn, error) {
	return d.dial(l, plan{
		source:      c.Local().Addr(),
		destination: c.Local(),
		ports:       d.outbound,
		mark:        d.slot.Mark(config.RoleProxy),
	})
}

// Probe is a dial as Outbound would make it for an unbound, unmarked socket.
type Probe struct {
	Local    netip.AddrPort
	Captured <-chan struct{} // closed when Own finds it, which may be before Probe returns
	conn     *Conn
}

// Probe dials, from any goroutine that is none of a loop. Of one that came back before it was connected, the error is ErrCaptured.
func (d *Dialer) Probe(ctx context.Context, g *loop.Group, source netip.Addr, destination netip.AddrPort) (*Probe, error) {
	found := make(chan struct{})
	p := &Probe{Captured: found}
	var err error
	rerr := g.Run(ctx, func(l *loop.Loop) {
		p.conn, err = d.dial(l, plan{source: source, destination: destination, ports: d.outbound, captured: found})
		if err == nil {
			p.Local = p.conn.Local()
		}
	})
	if rerr != nil {
		err = &Error{reason(rerr), rerr}
	}
	if err != nil {
		return nil, err
	}
	return p, nil
}

// Close resets the connection.
func (p *Probe) Close() { p.conn.Loop().Do(p.conn.Abort) } // else the group is gone, and the connection with it

// Own reports whether an accepted connection is a dial of ours, come back, and whether that dial was a Probe.
func (d *Dialer) Own(c Client) (own, probe bool) { return d.own.find(c.Remote(), c.Local()) }

// refusesSource reports whether a dial failed because the socket may not have the source address that it was to have.
func refusesSource(err error) bool {
	call, ok := errors.AsType[*os.SyscallError](err)
	if !ok || call.Syscall != "bind" && call.Syscall != "setsockopt IP_TRANSPARENT" && call.Syscall != "setsockopt IPV6_TRANSPARENT" {
		return false
	}
	return errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL)
}

// ErrCaptured says that a dial of ours was given back to us.
var ErrCaptured = &config.Fault{
	Err:  errors.New("own dial captured: the capture takes the proxy's own connections and hands them back to it"),
	Hint: "run the proxy as the user that init was told (--proxy-uid, 1666 by default), or outside of the captured cgroup",
}

// Conn is a dialled connection.
type Conn struct {
	*loop.Conn
	local netip.AddrPort
	entry *entry
}

// Local is the address from which it was dialled.
func (c *Conn) Local() netip.AddrPort { return c.local }

// Take makes one of what another way of dialling than ours returned. Its error is of type *Error.
func Take(l *loop.Loop, tcp *net.TCPConn, err error) (*Conn, error) {
	if err != nil {
		return nil, &Error{reason(err), bare(err)}
	}
	conn, err := l.Adopt(tcp)
	if err != nil {
		return nil, &Error{reason(err), err}
	}
	return &Conn{Conn: conn, local: conn.Local(), entry: foreign()}, nil
}

// Captured reports whether the capture gave the connection back to us, so that its other end was ours.
func (c *Conn) Captured() bool { return c.entry.wasFound() }

// Closed is to be called when the connection was closed, by whomever.
func (c *Conn) Closed() { c.entry.forget() }

// Abort resets the connection.
func (c *Conn) Abort() {
	c.Conn.Abort()
	c.Closed()
}
