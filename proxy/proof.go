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
// It rests while all is well: a capture that is installed later shows itself by the first dial that comes back, and then
// doubted is called.
func (s *Server) keepProving(ctx context.Context) {
	for {
		err := s.prove(ctx)
		if ctx.Err() != nil {
			return
		}
		s.proofResult(err)
		var again <-chan time.Time
		if err != nil {
			again = time.After(proofAgain)
		}
		select {
		case <-ctx.Done():
			return
		case <-again:
		case <-s.doubt:
			select { // the doubt is in the readiness already; do not dispel it before there was time to read it
			case <-ctx.Done():
				return
			case <-time.After(proofAgain):
			}
		}
	}
}

// doubted notes that a dial of ours was captured, outside of a proof.
func (s *Server) doubted() {
	s.proofResult(upstream.ErrCaptured)
	select {
	case s.doubt <- struct{}{}:
	default:
	}
}

func (s *Server) proofResult(err error) {
	switch changed := s.state.prove(err); {
	case !changed:
	case err != nil:
		s.log.Error("not ready", "error", err, "hint", config.HintOf(err))
	default:
		s.log.Info("ready: own dials pass uncaptured")
	}
}

func (s *Server) prove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, proofTimeout)
	defer cancel()
	families := []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})}
	if s.outbound.HasIPv6() {
		families = append(families, netip.IPv6Loopback())
	}
	for _, loopback := range families {
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
	return nil
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
	conn, captured, err := s.dialer.Probe(ctx, loopback, target)
	if conn != nil {
		defer conn.Abort()
	}
	switch {
	case errors.Is(err, upstream.ErrCaptured):
		return upstream.ErrCaptured
	case err != nil:
		return fmt.Errorf("own dials could not be proven to pass uncaptured: dial %s from %s: %w", target, loopback, err)
	}
	for {
		select {
		case <-captured:
			return upstream.ErrCaptured
		case from := <-arrived:
			if from == conn.Local() {
				return nil
			} // else somebody else's
		case <-ctx.Done():
			return fmt.Errorf("own dials could not be proven to pass uncaptured: connected to %s from %s, but it arrived nowhere: does something else take this host's connections?",
				target, conn.Local())
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
