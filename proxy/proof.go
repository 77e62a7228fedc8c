// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/proxy/listen"
	"github.com/pillionproxy/pillion/proxy/upstream"
)

const (
	// proofTimeout is generous: either outcome comes within a round trip on this host.
	proofTimeout = 5 * time.Second
	// proofAgain is how soon a proof that failed is tried again.
	proofAgain = time.Second
)

// keepProving shows that what the proxy dials is not given back to it, at the start and again while there is doubt, until
// ctx is done.
//
// For each family a listener is opened at an address of this host and dialled just as for an app, but from the loopback
// address (the capture leaves alone what goes from an address to itself). Not captured, the dial arrives there; captured,
// it arrives at our own outbound listener, whose accept knows it again. If this host has no address of a family but
// loopback and link-local, there is nothing to dial that could be captured, and nothing is tried.
//
// That is all that can be tried beforehand without sending something off this host, and it shows nothing of a capture that
// leaves alone what this host sends to itself, as those by iptables do. Under such a one, and one that is installed later,
// the first dial that comes back tells: it is cut at its accept as any, doubted is called, and from then on that very dial
// is tried too.
func (s *Server) keepProving(ctx context.Context) {
	var returned suspect
	for {
		err := s.prove(ctx, returned)
		if ctx.Err() != nil {
			return
		}
		if err != nil || len(s.doubt) == 0 {
			s.proofResult(err)
		}
		var again <-chan time.Time
		if err != nil {
			again = time.After(proofAgain)
		}
		select {
		case <-ctx.Done():
			return
		case <-again:
		case returned = <-s.doubt:
			select { // the doubt is in the readiness already; do not dispel it before there was time to read it
			case <-ctx.Done():
				return
			case <-time.After(proofAgain):
			}
		}
	}
}

// suspect is a dial of ours that came back. The zero value is none.
type suspect struct {
	source      netip.Addr
	destination netip.AddrPort
}

// doubted notes that a dial of ours was captured, outside of a proof: c is what was accepted.
func (s *Server) doubted(c upstream.Client) {
	select {
	case s.doubt <- suspect{c.Remote().Addr(), c.Local()}: // first: a proof that ends just now is not to dispel it
	default: // one is enough
	}
	s.proofResult(upstream.ErrCaptured)
}

func (s *Server) proofResult(err error) {
	switch changed := s.state.prove(err); {
	case !changed:
	case err != nil:
		s.log.Error("not ready", "error", err, "hint", config.HintOf(err))
	default:
		s.log.Info("ready: own dials do not come back")
	}
}

var (
	loopback4 = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	loopback6 = netip.IPv6Loopback()
)

// prove tries what can be tried, and the dial that came back last, if one has.
func (s *Server) prove(ctx context.Context, returned suspect) error {
	ctx, cancel := context.WithTimeout(ctx, proofTimeout)
	defer cancel()
	for _, loopback := range []netip.Addr{loopback4, loopback6} {
		if !listen.IsOwn(loopback) {
			continue
		}
		l, err := listenAtOwnAddress(ctx, loopback.Is4())
		if err != nil {
			return fmt.Errorf("own dials could not be proven to pass uncaptured: %w", err)
		}
		if l == nil {
			continue
		}
		if err := s.proveBy(ctx, l, loopback); err != nil {
			return err
		}
	}
	if returned == (suspect{}) {
		return nil
	}
	return s.proveAgain(ctx, returned)
}

// proveAgain repeats a dial that came back. If it comes through this time, it says nothing and is reset: to its server, one
// more connection from an app that has just tried to make one.
func (s *Server) proveAgain(ctx context.Context, d suspect) error {
	if !listen.IsOwn(d.source) {
		return nil // in a client's name: the answers would go to that client
	}
	probe, err := s.dialer.Probe(ctx, s.loops, d.source, d.destination)
	switch {
	case errors.Is(err, upstream.ErrCaptured):
		return upstream.ErrCaptured
	case err != nil:
		return nil // refused, unreachable or not answered: by whomever, not by us
	}
	defer probe.Close()
	// Connected, but by our own kernel if it was captured, and not accepted yet. A listener accepts in the order in which it
	// was connected to; so we connect to it, and when that is accepted, it is known of the other.
	loopback := loopback4
	if d.destination.Addr().Is6() {
		loopback = loopback6
	}
	marker, err := s.dialer.Probe(ctx, s.loops, loopback, netip.AddrPortFrom(loopback, s.outbound.Port()))
	switch {
	case errors.Is(err, upstream.ErrCaptured): // accepted already
	case err != nil:
		return fmt.Errorf("own dials could not be proven to pass uncaptured: dial the outbound listener: %w", err)
	default:
		defer marker.Close()
		select {
		case <-marker.Captured:
		case <-ctx.Done():
			return fmt.Errorf("own dials could not be proven to pass uncaptured: the outbound listener does not accept: %w", ctx.Err())
		}
	}
	select {
	case <-probe.Captured:
		return upstream.ErrCaptured
	default:
		return nil
	}
}

// listenAtOwnAddress opens a listener at the first address of this host that can be captured; nil if there is none.
func listenAtOwnAddress(ctx context.Context, v4 bool) (*net.TCPListener, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list own addresses: %w", err)
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	for _, a := range addrs {
		prefix, err := netip.ParsePrefix(a.String())
		if err != nil || prefix.Addr().Is4() != v4 || !prefix.Addr().IsGlobalUnicast() {
			continue
		}
		l, err := lc.Listen(ctx, "tcp", netip.AddrPortFrom(prefix.Addr(), 0).String())
		if err == nil {
			return l.(*net.TCPListener), nil
		} // else an address that is just coming (IPv6: tentative) or going
	}
	return nil, nil
}

// proveBy dials the listener, which it takes over.
func (s *Server) proveBy(ctx context.Context, l *net.TCPListener, loopback netip.Addr) error {
	ctx, cancel := context.WithCancel(ctx)
	arrived := make(chan netip.AddrPort)
	var accepting sync.WaitGroup
	accepting.Go(func() { acceptProof(ctx, l, arrived) })
	defer func() {
		cancel()
		_ = l.Close()
		accepting.Wait()
	}()
	target := l.Addr().(*net.TCPAddr).AddrPort()
	probe, err := s.dialer.Probe(ctx, s.loops, loopback, target)
	switch {
	case errors.Is(err, upstream.ErrCaptured):
		return upstream.ErrCaptured
	case err != nil:
		return fmt.Errorf("own dials could not be proven to pass uncaptured: dial %s from %s: %w", target, loopback, err)
	}
	defer probe.Close()
	for {
		select {
		case <-probe.Captured:
			return upstream.ErrCaptured
		case from := <-arrived:
			if from == probe.Local {
				return nil
			} // else somebody else's
		case <-ctx.Done():
			return fmt.Errorf("own dials could not be proven to pass uncaptured: connected to %s from %s, but it arrived nowhere: does something else take this host's connections?",
				target, probe.Local)
		}
	}
}

// acceptProof tells who arrives at the listener, until it is closed.
func acceptProof(ctx context.Context, l *net.TCPListener, arrived chan<- netip.AddrPort) {
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			return
		}
		from := c.RemoteAddr().(*net.TCPAddr).AddrPort()
		_ = c.Close()
		select {
		case arrived <- netip.AddrPortFrom(from.Addr().Unmap(), from.Port()):
		case <-ctx.Done():
			return
		}
	}
}
