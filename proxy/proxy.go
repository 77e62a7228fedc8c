// SPDX-License-Identifier: Apache-2.0

// Package proxy is the user half: it takes the connections that the capture hands to its listeners, dials where each was
// meant to go, and passes on what both sides say.
//
// What always holds:
//   - The proxy is not told how connections come to it. Package listen finds out whom each client meant, and above it that
//     is the connection's local address, whatever the backend of the capture.
//   - A connection and the dial for it belong to one event loop (package loop), and so does all that is known of them there.
//     Their handlers are straight-line code, and never block: what may (a log, a dial by somebody else) has a goroutine.
//   - A connection has one record, which is closed with one reason when both sockets are closed.
//   - A dial of the proxy's own that comes back is cut at once, wherever it comes from: there are no loops.
//   - Descriptors are bounded. One connection too many is accepted and reset, so that its client is told.
//   - Serve returns when, and only when, every socket is closed and every goroutine has ended.
package proxy

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/proxy/admin"
	"github.com/pillionproxy/pillion/proxy/lifecycle"
	"github.com/pillionproxy/pillion/proxy/listen"
	"github.com/pillionproxy/pillion/proxy/loop"
	"github.com/pillionproxy/pillion/proxy/telemetry"
	"github.com/pillionproxy/pillion/proxy/udp"
	"github.com/pillionproxy/pillion/proxy/upstream"
)

// Config is what a Server is made of. A listener's port that is 0 is chosen by Listen. Admin and Health are not opened if
// they are the zero AddrPort.
type Config struct {
	config.Proxy
	Log      *slog.Logger       // operational messages; slog.Default if nil
	Access   *slog.Logger       // one line per connection at its close; Log if nil
	Observer telemetry.Observer // told of every connection; may be nil
	// Outbound is a listener that is open already, and then the only one: in a network namespace of the apps' own nothing comes
	// in but through us. Listen takes it over, also when it fails. May be nil.
	Outbound *listen.Listener
	// Datagrams are carried if there are listeners for them. Listen takes these over, also when it fails.
	Datagrams Datagrams
}

// Datagrams are the listeners for captured datagrams (see udp.New), and the side from which these come.
type Datagrams struct {
	Listeners []*os.File
	Side      udp.Side
}

// Server is the sidecar. It is made by Listen and used by one call of Serve.
type Server struct {
	cfg    config.Proxy
	log    *slog.Logger
	book   *telemetry.Book
	dialer *upstream.Dialer

	outbound, inbound, inboundOwn *listen.Listener
	datagrams                     *udp.Relay
	admin, health                 net.Listener // nil if there is none

	loops   *loop.Group
	live    *lifecycle.Live
	state   readiness
	doubt   chan suspect  // one place: a dial of ours that has come back
	failing atomic.Int64  // when an accept that failed was last logged, in Unix seconds
	cut     chan struct{} // closed by Close
	cutOnce sync.Once
}

// Listen opens all listeners: what it returns has its ports, and the kernel queues connections for it, but none is
// accepted before Serve. Its errors carry a hint.
func Listen(cfg Config) (*Server, error) {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Access == nil {
		cfg.Access = cfg.Log
	}
	s := &Server{cfg: cfg.Proxy, log: cfg.Log, outbound: cfg.Outbound, doubt: make(chan suspect, 1), cut: make(chan struct{})}
	s.book = telemetry.NewBook(cfg.Access, cfg.Observer)
	datagrams, err := udp.New(cfg.Datagrams.Listeners, cfg.Datagrams.Side, s.book)
	s.datagrams = datagrams
	if err := errors.Join(err, s.listen()); err != nil {
		s.closeListeners()
		return nil, err
	}
	if s.loops, err = loop.New(loop.Config{Log: s.log}); err != nil {
		s.closeListeners()
		return nil, err
	}
	s.book.WatchLoops(s.loops.Figures)
	if !s.outbound.Kind().Transparent {
		s.log.Warn("no CAP_NET_RAW: serves the backend redirect alone")
	}
	if !s.outbound.HasIPv6() {
		s.log.Warn("this host has no ::1: going on with IPv4 only")
	}
	limit, warning := lifecycle.ConnectionLimit(cfg.MaxConnections)
	if warning != "" {
		s.log.Warn(warning, "limit", limit)
	}
	s.live = lifecycle.NewLive(limit)
	s.dialer = upstream.New(s.cfg, s.log)
	return s, nil
}

// validate is config.Proxy's Validate, for which a port that is yet to be chosen is any that fits.
func validate(p config.Proxy) error {
	l := &p.Listeners
	for _, port := range []*uint16{&l.Outbound, &l.Inbound, &l.InboundOwn} {
		for free := uint16(1); *port == 0; free++ {
			if usable(p.Shared, free) {
				*port = free
			}
		}
	}
	return p.Validate()
}

// usable reports whether a listener may have the port, beside the listeners that have one already.
func usable(s config.Shared, port uint16) bool {
	return !s.Listeners.Contains(port) && !s.DialOutbound.Contains(port) && !s.DialInbound.Contains(port)
}

func (s *Server) listen() (err error) {
	if err := validate(s.cfg); err != nil {
		return &config.Fault{Err: err, Exit: config.ExitConfig}
	}
	if s.outbound != nil {
		s.cfg.Listeners = config.Listeners{Outbound: s.outbound.Port()}
		return s.listenHTTP()
	}
	kind := listen.KindOf(s.cfg.Listen)
	ok := func(port uint16) bool { return usable(s.cfg.Shared, port) }
	for _, l := range []struct {
		listener **listen.Listener
		port     *uint16
	}{
		{&s.outbound, &s.cfg.Listeners.Outbound},
		{&s.inbound, &s.cfg.Listeners.Inbound},
		{&s.inboundOwn, &s.cfg.Listeners.InboundOwn},
	} {
		if *l.listener, err = listen.Open(kind, *l.port, ok); err != nil {
			return err
		}
		*l.port = (*l.listener).Port()
	}
	return s.listenHTTP()
}

func (s *Server) listenHTTP() (err error) {
	if s.admin, err = openHTTP("--admin", s.cfg.Admin); err != nil {
		return err
	}
	s.health, err = openHTTP("--health", s.cfg.Health)
	return err
}

func openHTTP(flag string, addr netip.AddrPort) (net.Listener, error) {
	if !addr.IsValid() {
		return nil, nil
	}
	l, err := admin.Listen(addr)
	if err != nil {
		return nil, &config.Fault{
			Err:  fmt.Errorf("listen for %s: %w", flag, err),
			Hint: fmt.Sprintf("give %s another address, or `none`", flag),
		}
	}
	return l, nil
}

// isListener reports whether the address is one of the listeners for captured connections.
func (s *Server) isListener(a netip.AddrPort) bool {
	return slices.ContainsFunc(s.listeners(), func(l *listen.Listener) bool { return l.At(a) })
}

// listeners are those for captured connections that are open.
func (s *Server) listeners() []*listen.Listener {
	return slices.DeleteFunc([]*listen.Listener{s.outbound, s.inbound, s.inboundOwn}, func(l *listen.Listener) bool { return l == nil })
}

// closeListeners closes what was opened; what was not is nil.
func (s *Server) closeListeners() {
	for _, l := range s.listeners() {
		l.Close()
	}
	if s.datagrams != nil {
		s.datagrams.Close()
	}
	for _, l := range []net.Listener{s.admin, s.health} {
		if l != nil {
			_ = l.Close()
		}
	}
}

// Listeners are the ports on which the server listens.
func (s *Server) Listeners() config.Listeners { return s.cfg.Listeners }

// Ready returns nil when the server accepts connections and is able to relay them, else why not.
func (s *Server) Ready() error { return s.state.ready() }

// Live lists the live connections, oldest first.
func (s *Server) Live() []telemetry.Connection { return s.book.Live() }
