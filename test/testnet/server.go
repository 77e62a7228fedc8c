// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
)

func parseIP(t testing.TB, s string) net.IP {
	t.Helper()
	addr, err := netip.ParseAddr(s)
	if err != nil {
		t.Fatalf("testnet: %v", err)
	}
	return addr.AsSlice()
}

// Listen listens in the namespace, with a socket of this process. It is plain TCP: Go's own default would be MPTCP.
// The network "tcp" with the address [::] takes both families, with v4-mapped peers.
func (ns *Namespace) Listen(network, addr string) *net.TCPListener {
	ns.t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	var ln net.Listener
	var err error
	ns.Do(func() { ln, err = lc.Listen(context.Background(), network, addr) })
	if err != nil {
		ns.t.Fatalf("testnet: listen on %s in %s: %v", addr, ns.Name, err)
	}
	return ln.(*net.TCPListener)
}

// Dial connects from the namespace, with a socket of this process. It waits as long as it takes; closing is the
// caller's.
func (ns *Namespace) Dial(network, addr string) (*net.TCPConn, error) {
	var d net.Dialer
	d.SetMultipathTCP(false)
	var c net.Conn
	var err error
	ns.Do(func() { c, err = d.DialContext(context.Background(), network, addr) })
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// Serve listens in the namespace and gives each connection to the handler.
func (ns *Namespace) Serve(network, addr string, handler func(*net.TCPConn)) *Server {
	ns.t.Helper()
	return Serve(ns.t, ns.Listen(network, addr), handler)
}

// Server accepts connections until the test ends.
type Server struct {
	Addr netip.AddrPort

	ln    *net.TCPListener
	wg    sync.WaitGroup
	mu    sync.Mutex
	conns map[*net.TCPConn]struct{}
	done  bool
}

// Serve takes the listener over and runs the handler for each connection in a goroutine of its own. The connection is
// closed when the handler returns. At the end of the test everything is closed, and the handlers are waited for.
func Serve(t testing.TB, ln *net.TCPListener, handler func(*net.TCPConn)) *Server {
	s := &Server{
		Addr:  ln.Addr().(*net.TCPAddr).AddrPort(),
		ln:    ln,
		conns: make(map[*net.TCPConn]struct{}),
	}
	s.wg.Go(func() { s.acceptLoop(handler) })
	t.Cleanup(s.Close)
	return s
}

func (s *Server) acceptLoop(handler func(*net.TCPConn)) {
	for {
		c, err := s.ln.AcceptTCP()
		if err != nil {
			return
		}
		s.mu.Lock()
		if s.done {
			s.mu.Unlock()
			c.Close()
			return
		}
		s.conns[c] = struct{}{}
		s.wg.Go(func() {
			defer s.forget(c)
			handler(c)
		})
		s.mu.Unlock()
	}
}

func (s *Server) forget(c *net.TCPConn) {
	s.mu.Lock()
	delete(s.conns, c)
	s.mu.Unlock()
	c.Close()
}

// Close ends the server and every connection of it, and waits for the handlers. From then on nobody listens. It may be
// called twice.
func (s *Server) Close() {
	s.mu.Lock()
	s.done = true
	// A process that another test starts at this moment would have a copy, and keep the port, until it executes its program.
	syscall.ForkLock.RLock()
	s.ln.Close()
	syscall.ForkLock.RUnlock()
	for c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
}
