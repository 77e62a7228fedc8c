// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"net"
	"slices"
	"sync"

	"github.com/pillionproxy/pillion/proxy/listen"
	"github.com/pillionproxy/pillion/proxy/loop"
	"github.com/pillionproxy/pillion/proxy/telemetry"
	"github.com/pillionproxy/pillion/proxy/upstream"
)

// Serve accepts and relays until ctx is done. Then it closes the listeners, so that the capture's failure policy decides
// over new connections, waits for the live ones up to the drain timeout, resets those that are left, and returns when
// nothing of the server is left. Datagrams are carried until the last connection has ended. It is called once.
func (s *Server) Serve(ctx context.Context) error {
	if !s.state.begin() {
		return nil
	}
	defer s.loops.Close()
	stopWeb := s.serveWeb()
	defer stopWeb()
	stopDatagrams := s.serveDatagrams()
	defer stopDatagrams()

	stopServing, err := s.serve(ctx)
	if err != nil {
		stopServing()
		return err
	}
	s.log.Info("serving", "listen", s.outbound.Kind().String(), "outbound", s.cfg.Listeners.Outbound, "inbound", s.cfg.Listeners.Inbound,
		"inbound_own", s.cfg.Listeners.InboundOwn, "ipv6", s.outbound.HasIPv6(), "max_connections", s.live.Limit())
	select {
	case <-ctx.Done():
	case <-s.cut:
	}
	s.state.drain()
	stopServing()
	if n := s.live.Drain(s.cfg.DrainTimeout, s.cut, func() { s.loops.Abort(errShutdown) }); n > 0 {
		s.log.Warn("reset connections that were still open", "connections", n)
	}
	return nil
}

// Close ends Serve at once, or cuts its drain short: live connections are reset. It does not wait for Serve to return. If
// Serve was not called, it closes the listeners.
func (s *Server) Close() {
	s.cutOnce.Do(func() { close(s.cut) })
	if s.state.abandon() {
		s.closeListeners()
		s.loops.Close()
	}
}

// serve accepts, and proves that it is right to, until stop is called, which waits until nothing more is accepted.
func (s *Server) serve(ctx context.Context) (stop func(), err error) {
	ctx, cancel := context.WithCancel(ctx)
	var proving sync.WaitGroup
	routes := s.routes()
	stop = func() {
		cancel()
		for _, r := range routes {
			r.listener.Close()
		}
		proving.Wait()
	}
	for _, r := range routes {
		if err := r.listener.Serve(s.loops, r); err != nil {
			return stop, err
		}
	}
	proving.Go(func() { s.keepProving(ctx) })
	return stop, nil
}

func (s *Server) serveDatagrams() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { s.datagrams.Serve(ctx) })
	return func() {
		cancel()
		running.Wait()
	}
}

// routes are the ways of connections through the server, one for each listener.
func (s *Server) routes() []*route {
	all := []*route{
		{Server: s, listener: s.outbound, direction: telemetry.Outbound, dial: s.dialer.Outbound},
		{Server: s, listener: s.inbound, direction: telemetry.Inbound, dial: s.dialer.Inbound},
		{Server: s, listener: s.inboundOwn, direction: telemetry.Inbound, dial: s.dialer.InboundOwn},
	}
	return slices.DeleteFunc(all, func(r *route) bool { return r.listener == nil })
}

// Publish carries the connections of one more listener, which it takes over, to a server that only dial reaches, until stop is
// called, which waits until nothing more is accepted; that is to be done before Serve is told to end. dial is called on a goroutine
// of its own.
func (s *Server) Publish(l *listen.Listener, dial func(context.Context, upstream.Client) (*net.TCPConn, error)) (stop func(), err error) {
	r := &route{Server: s, listener: l, direction: telemetry.Inbound, dial: func(l *loop.Loop, c upstream.Client) (*upstream.Conn, error) {
		var conn *net.TCPConn
		var err error
		l.Offload(func(ctx context.Context) {
			conn, err = dial(ctx, c)
			if cause := context.Cause(ctx); err != nil && cause != nil {
				err = cause
			}
		})
		return upstream.Take(l, conn, err)
	}}
	if err := l.Serve(s.loops, r); err != nil {
		l.Close()
		return nil, err
	}
	return l.Close, nil
}
