// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"

	"github.com/pillionproxy/pillion/config"
)

// TestLivenessIsExact is row 21, what TestProxyDown leaves: the proxy is looked for at every connect and in the family of
// that connect, so that there is no moment in which the answer is an old one.
func TestLivenessIsExact(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.init("--on-proxy-down", "closed")
	outbound := p.paths()[:3]
	expect := func(when string, w path, alive bool, accepted <-chan *net.TCPConn) {
		t.Helper()
		to := netip.AddrPortFrom(w.to, 9) // nobody is there: who answers is the stand-in
		c, err := w.dial(to)
		if !alive {
			if !errors.Is(err, syscall.EHOSTUNREACH) {
				t.Errorf("%s: %s: %v, want EHOSTUNREACH", when, w.name, err)
			}
			return
		}
		if err != nil {
			t.Errorf("%s: %s: %v, want it captured", when, w.name, err)
			return
		}
		defer c.Close()
		a := <-accepted
		defer a.Close()
		if addrPort(a.LocalAddr()) != to || addrPort(a.RemoteAddr()) != unmap(c.Own) {
			t.Errorf("%s: %s: the stand-in has %s to %s, want %s to %s", when, w.name, a.RemoteAddr(), a.LocalAddr(), c.Own, to)
		}
	}
	for range 10 {
		for _, w := range outbound {
			expect("no proxy", w, false, nil)
		}
		accepted, stop := p.standIn(config.PortOutbound)
		for _, w := range outbound {
			expect("a proxy", w, true, accepted)
		}
		stop()
		for _, w := range outbound {
			expect("no proxy any more", w, false, nil)
		}
	}
	for _, host := range []string{"127.0.0.1", "::1"} {
		accepted, stop := p.standIn(config.PortOutbound, host)
		for _, w := range outbound {
			expect("a proxy on "+host+" alone", w, w.to.Is6() == (host == "::1"), accepted)
		}
		stop()
	}
	// The app's connection to the proxy's port of loopback leaves a socket there, but no listener.
	accepted, stop := p.standIn(config.PortOutbound)
	c, err := p.ns.Dial("tcp", "127.0.0.1:16001")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	defer (<-accepted).Close()
	stop()
	for _, w := range outbound {
		expect("a connection in place of a listener", w, false, nil)
	}
	// Another network namespace's proxy is nobody's here.
	elsewhere := p.ext.Listen("tcp", "127.0.0.1:16001")
	defer elsewhere.Close()
	for _, w := range outbound {
		expect("a proxy in another namespace", w, false, nil)
	}
}
