// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/pillionproxy/pillion/test/testnet"
)

// These tests are of the proxy alone: the capture is a handful of REDIRECT rules, as anybody would write them.

// nat changes the table nat of the pod, for both families.
func (p *pod) nat(rules ...string) {
	p.t.Helper()
	for _, name := range []string{"iptables-nft", "ip6tables-nft"} {
		program := testnet.NeedProgram(p.t, name, "iptables")
		for _, rule := range rules {
			must(p.t, name+" "+rule, run(p.t, p.ns.Command(nil, program, append([]string{"-t", "nat"}, strings.Fields(rule)...)...)))
		}
	}
}

const (
	passProxy   = "-I OUTPUT -p tcp -m owner --uid-owner 1666 -j RETURN"
	passLocal   = "-A OUTPUT -p tcp -m addrtype --dst-type LOCAL -j RETURN"
	takeOut     = "-A OUTPUT -p tcp -j REDIRECT --to-ports 16001"
	passInbound = "-A PREROUTING -p tcp --dport 16006:16020 -j RETURN"
	takeIn      = "-A PREROUTING -i eth0 -p tcp -j REDIRECT --to-ports 16006"
)

// startUnprivileged starts a proxy that has no capability, and can get none.
func (p *pod) startUnprivileged(args ...string) *sidecar {
	p.t.Helper()
	s := p.proxyCmd(inside, args...)
	s.User.Caps = []uintptr{}
	if err := s.Start(); err != nil {
		p.t.Fatalf("proxy: %v", err)
	}
	p.t.Cleanup(func() {
		if p.t.Failed() {
			p.t.Logf("the proxy %d said:\n%s", s.Process.Pid, tail(s.log.String(), 4000))
		}
	})
	p.proxy = s
	return s
}

// newRedirected makes a pod with all rules, and a proxy that has no capability.
func newRedirected(t *testing.T) *pod {
	t.Helper()
	p := newPod(t)
	p.nat(passProxy, passLocal, takeOut, passInbound, takeIn)
	p.startUnprivileged().waitReady()
	return p
}

// redirected connects once over the path, to one of the addresses of its server, and checks what each end saw.
func (p *pod) redirected(t *testing.T, w path, at netip.Addr) {
	t.Helper()
	saw := make(chan seen, 1)
	server, to := w.server(echo(saw))
	defer server.Close()
	to = netip.AddrPortFrom(at, to.Port())
	c, err := w.dial(to)
	if err != nil {
		t.Fatalf("%s to %s: %v", w.name, to, err)
	}
	defer c.Close()
	if err := errors.Join(exchange(c, "redirected"), finish(c.TCPConn)); err != nil {
		t.Fatalf("%s to %s: %v", w.name, to, err)
	}
	from := w.from // of the proxy's dial
	if w.direction == "inbound" {
		from = at
	}
	r, far := p.proxy.waitRecordOf(t, c), <-saw
	for _, check := range []struct {
		what      string
		got, want any
	}{
		{"the client's own address", c.Own.Addr().Unmap(), w.from},
		{"the client's peer", unmap(c.Peer), to},
		{"the source that the proxy saw", r.Source, unmap(c.Own)},
		{"the destination that the proxy saw", r.Destination, to},
		{"the server's own address", far.own, to},
		{"the server's peer", far.peer.Addr(), from},
		{"the server's peer is the proxy's dial", far.peer, r.Upstream},
		{"that dial's port is in the proxy's range", w.ports.Contains(far.peer.Port()), true},
		{"direction", r.Direction, w.direction},
		{"reason", r.Reason, "ok"},
	} {
		if check.got != check.want {
			t.Errorf("%s to %s: %s: %v, want %v", w.name, to, check.what, check.got, check.want)
		}
	}
}

// redirectedAll is redirected over every path, inbound to the pod's second addresses too.
func (p *pod) redirectedAll(t *testing.T) {
	t.Helper()
	for _, w := range p.paths() {
		p.redirected(t, w, w.to)
		switch {
		case w.direction == "inbound" && w.to.Is4():
			p.redirected(t, w, netip.MustParseAddr(second4))
		case w.direction == "inbound":
			p.redirected(t, w, netip.MustParseAddr(second6))
		}
	}
}

// wantResetAt connects, which the proxy must answer by a reset, and returns its record of that.
func (p *pod) wantResetAt(t *testing.T, dial func() (*testnet.Conn, error), to netip.AddrPort, reason string) record {
	t.Helper()
	before := len(p.proxy.records())
	c, err := dial()
	if err == nil {
		defer c.Close()
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%s: %v, want ECONNRESET", to, err)
	}
	var found record
	testnet.Wait(t, fmt.Sprintf("the access log says %s of the connection to %s", reason, to), func() bool {
		for _, r := range p.proxy.records()[before:] {
			if r.Destination == to && r.Reason == reason {
				found = r
				return true
			}
		}
		return false
	})
	return found
}

func TestRedirectProxyWithoutCapability(t *testing.T) {
	t.Parallel()
	p := newRedirected(t)
	got := p.proxy.status("Uid", "CapPrm", "CapEff", "CapBnd", "NoNewPrivs")
	for _, set := range []string{"CapPrm", "CapEff", "CapBnd"} {
		if want := fmt.Sprintf("%016x", 0); got[set] != want {
			t.Errorf("%s is %s, want %s", set, got[set], want)
		}
	}
	if got["Uid"] != "1666 1666 1666 1666" || got["NoNewPrivs"] != "1" {
		t.Errorf("status %v, want uid 1666 and NoNewPrivs 1", got)
	}
	p.redirectedAll(t)
	log := p.proxy.log.String()
	if strings.Count(log, "no CAP_NET_RAW") != 1 {
		t.Errorf("the log does not say once that the proxy serves one backend alone:\n%s", log)
	}
	if strings.Contains(log, "packet marks") || strings.Contains(log, "in its client's name") {
		t.Errorf("the log tells of a loss that is none here:\n%s", log)
	}
}

// TestRedirectProxyWithCapability: what it could do more would be wrong under a redirection, and is not done.
func TestRedirectProxyWithCapability(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.nat(passProxy, passLocal, takeOut, passInbound, takeIn)
	p.startProxy(inside, "--listen", "any")
	p.redirectedAll(t)
}

// TestRedirectProxyOnAnyAddressServesEBPFToo: with the capability, one proxy serves every capture.
func TestRedirectProxyOnAnyAddressServesEBPFToo(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.init()
	p.startProxy(inside, "--listen", "any")
	for _, w := range p.paths() {
		p.captured(t, w)
	}
	// Another host's port of the same number is no listener of ours.
	for _, w := range p.paths()[:3] {
		w.port = 16001
		p.captured(t, w)
	}
}

// TestRedirectProxyRefusesConnectionsToItself: whoever connects to a listener is reset, from wherever, and whether
// connection tracking knows of it or not.
func TestRedirectProxyRefusesConnectionsToItself(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.startUnprivileged().waitReady()
	refused := func(from string, dial func(string) (*testnet.Conn, error), hosts ...string) {
		for _, host := range hosts {
			for _, port := range []uint16{16001, 16006, 16007} {
				to := netip.AddrPortFrom(netip.MustParseAddr(host), port)
				t.Logf("from %s to %s", from, to)
				p.wantResetAt(t, func() (*testnet.Conn, error) { return dial(to.String()) }, to, "own_listener")
			}
		}
	}
	outside := func(to string) (*testnet.Conn, error) {
		c, err := p.ext.Dial("tcp", to)
		return &testnet.Conn{TCPConn: c}, err
	}
	app := func(to string) (*testnet.Conn, error) { return p.app.Dial(testnet.Dial{To: to}) }
	all := func() {
		refused("outside", outside, pod4, second4, pod6)
		refused("the app", app, pod4, pod6, "127.0.0.1", "127.0.0.2", "::1")
	}
	t.Log("not tracked")
	all()
	t.Log("tracked; inbound, port 16001 is redirected as any other, the others are not")
	p.nat(passProxy, passLocal, takeOut, passInbound, takeIn)
	all()
	p.redirectedAll(t)
}

// TestRedirectProxyPassesOnRefusals: where nobody listens, the client is reset.
func TestRedirectProxyPassesOnRefusals(t *testing.T) {
	t.Parallel()
	p := newRedirected(t)
	for _, w := range p.paths() {
		to := netip.AddrPortFrom(w.to, 9)
		p.wantResetAt(t, func() (*testnet.Conn, error) { return w.dial(to) }, to, "upstream_connect_refused")
	}
}

// nowReady is what the proxy logs when it gets ready.
const nowReady = "own dials do not come back"

// redirections counts the outbound connections that rules of either family have redirected.
func (p *pod) redirections(t *testing.T) (n int) {
	t.Helper()
	for _, name := range []string{"iptables-nft", "ip6tables-nft"} {
		r := run(t, p.ns.Command(nil, testnet.NeedProgram(t, name, "iptables"), "-t", "nat", "-nvxL", "OUTPUT"))
		must(t, name, r)
		for line := range strings.Lines(r.stdout) {
			if fields := strings.Fields(line); len(fields) > 2 && fields[2] == "REDIRECT" {
				packets, err := strconv.Atoi(fields[0])
				if err != nil {
					t.Fatal(err)
				}
				n += packets
			}
		}
	}
	return n
}

// wantUnready waits until the proxy says that it is not ready, and why.
func (s *sidecar) wantUnready(t *testing.T) {
	t.Helper()
	testnet.Wait(t, "the proxy says that its own dials are captured", func() bool {
		code, body, err := s.get("/healthz/ready")
		return err == nil && code == http.StatusServiceUnavailable && strings.Contains(body, "own dial captured") && strings.Contains(body, "--proxy-uid")
	})
}

// TestRedirectProxyThatIsCapturedItself: rules that forget the proxy's user send each of its dials back to it. Nothing that
// stays on this host shows it beforehand; the first dial is cut when it comes back, and the proxy is not ready until the
// rule is there.
func TestRedirectProxyThatIsCapturedItself(t *testing.T) {
	t.Parallel()
	for i, name := range []string{"v4", "v6", "mapped"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t)
			p.nat(passLocal, takeOut, passInbound, takeIn)
			s := p.startUnprivileged()
			s.waitReady()
			w := p.paths()[i]
			to := w.start(echo(make(chan seen, 10)))
			p.wantResetAt(t, func() (*testnet.Conn, error) { return w.dial(to) }, to, "own_dial_captured")
			s.wantUnready(t)
			testnet.Wait(t, "it has tried that dial again, twice", func() bool { return p.redirections(t) >= 4 })
			if n := strings.Count(s.log.String(), nowReady); n != 1 {
				t.Errorf("said %d times that it is ready, want once, before the first dial", n)
			}
			all := s.records()
			if len(all) != 2 || slices.ContainsFunc(all, func(r record) bool { return r.Reason != "own_dial_captured" }) {
				t.Errorf("records %+v, want the app's connection and the one dial for it", all)
			}
			p.nat(passProxy)
			s.waitReady()
			p.redirectedAll(t)
		})
	}
}

// TestRedirectProxyThatIsCapturedItselfUnderLoad: connection tracking gives a connection another source port if, redirected,
// it would look like an earlier one. The proxy's dial then comes back unknown, is dialled for, and so on.
func TestRedirectProxyThatIsCapturedItselfUnderLoad(t *testing.T) {
	t.Parallel()
	for i, name := range []string{"v4", "v6"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t)
			p.nat(passLocal, takeOut, passInbound, takeIn)
			// So few ports that each is used again while its last connection is still tracked.
			s := p.startUnprivileged("--dial-outbound", "20000-20015")
			s.waitReady()
			w := p.paths()[i]
			const batches, batch = 50, 8
			for n := range batches {
				var dialling sync.WaitGroup
				for m := range batch {
					dialling.Go(func() {
						to := netip.AddrPortFrom(w.to, uint16(1000+n*batch+m))
						c, err := w.dial(to)
						if err == nil {
							defer c.Close()
							_, err = c.Read(make([]byte, 1))
						}
						if !errors.Is(err, syscall.ECONNRESET) {
							t.Errorf("%s: %v, want ECONNRESET", to, err)
						}
					})
				}
				dialling.Wait()
			}
			s.wantUnready(t)
			if got := len(s.records()); got > 2*batches*batch {
				t.Errorf("%d connections at the proxy for %d of the app: they went round", got, batches*batch)
			}
			p.nat(passProxy)
			s.waitReady()
		})
	}
}

// TestRedirectProxyThatIsCapturedOnItsHostToo: rules that except nothing are noticed at the start, and inbound dials that
// come back are cut as well.
func TestRedirectProxyThatIsCapturedOnItsHostToo(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.nat(takeOut, passInbound, takeIn)
	s := p.startUnprivileged()
	s.log.Wait(t, "not ready, with the hint", func(l string) bool {
		return strings.Contains(l, "own dial captured") && strings.Contains(l, "--proxy-uid")
	})
	for _, w := range p.paths()[3:] {
		to := w.start(echo(make(chan seen, 10)))
		dial := func() (*testnet.Conn, error) { return w.dial(to) }
		p.wantResetAt(t, dial, to, "own_dial_captured")
	}
	p.nat(passProxy)
	s.log.Wait(t, "ready", func(l string) bool { return strings.Contains(l, nowReady) })
}
