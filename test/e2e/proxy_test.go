// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"

	"github.com/pillionproxy/pillion/test/testnet"
	"golang.org/x/sys/unix"
)

// TestProxyHasNothingButNetRaw reads what the kernel says of the running proxy.
func TestProxyHasNothingButNetRaw(t *testing.T) {
	t.Parallel()
	p := newCaptured(t, inside)
	got := p.proxy.status("Uid", "CapPrm", "CapEff", "NoNewPrivs")
	for _, set := range []string{"CapPrm", "CapEff"} {
		if want := fmt.Sprintf("%016x", 1<<unix.CAP_NET_RAW); got[set] != want {
			t.Errorf("%s is %s, want %s", set, got[set], want)
		}
	}
	if got["Uid"] != "1666 1666 1666 1666" || got["NoNewPrivs"] != "1" {
		t.Errorf("status %v, want uid 1666 and NoNewPrivs 1", got)
	}
	for _, w := range p.paths() {
		p.captured(t, w)
	}
}

// TestProxyGivesUpTheRest: started as root with everything, it keeps what it needs.
func TestProxyGivesUpTheRest(t *testing.T) {
	t.Parallel()
	p := newCaptured(t, outside)
	needs := 1 << unix.CAP_NET_RAW
	if !testnet.RawMark.Have() {
		needs |= 1 << unix.CAP_NET_ADMIN
	}
	for set, got := range p.proxy.status("CapPrm", "CapEff") {
		if want := fmt.Sprintf("%016x", needs); got != want {
			t.Errorf("%s is %s, want %s", set, got, want)
		}
	}
}

// TestProxyThatIsCapturedItself: inside the cgroup as another user than init was told, its own dials come back to it. It
// must say that it is not ready, and why.
func TestProxyThatIsCapturedItself(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.init()
	s := p.proxyCmd(inside)
	s.User.UID = 1667
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	last := ""
	defer func() {
		if t.Failed() {
			t.Logf("/healthz/ready said last: %q; the log:\n%s", last, tail(s.log.String(), 3000))
		}
	}()
	testnet.Wait(t, "the proxy says that its own dials are captured", func() bool {
		if !s.Running() {
			t.Fatalf("the proxy ended:\n%s", s.log)
		}
		code, body, err := s.get("/healthz/ready")
		if err == nil && code == http.StatusOK {
			t.Fatalf("it says that it is ready: %s", body)
		}
		last = body
		return code == http.StatusServiceUnavailable && strings.Contains(body, "--proxy-uid")
	})
	s.log.Wait(t, "the log says it too, with the hint", func(l string) bool { return strings.Contains(l, "--proxy-uid") })
	if code, _, err := s.get("/healthz/live"); err != nil || code != http.StatusOK {
		t.Errorf("/healthz/live: %d, %v, want 200", code, err)
	}
	t.Logf("/healthz/ready: %s", last)
}

// TestHealthAndMetrics are for everybody, the admin interface for nobody outside.
func TestHealthAndMetrics(t *testing.T) {
	t.Parallel()
	p := newCaptured(t, inside)
	for _, w := range p.paths() {
		p.captured(t, w)
	}
	want := []string{`pillion_connections_opened_total{direction="outbound",protocol="tcp"} 3`, `pillion_connections_opened_total{direction="inbound",protocol="tcp"} 3`}
	last := ""
	testnet.Wait(t, "the metrics count three connections each way", func() bool {
		var err error
		if _, last, err = p.proxy.get("/metrics"); err != nil {
			t.Fatal(err)
		}
		return strings.Contains(last, want[0]) && strings.Contains(last, want[1])
	})
	for _, host := range []string{pod4, pod6} {
		c, err := p.ext.Dial("tcp", net.JoinHostPort(host, "16020"))
		if err != nil {
			t.Errorf("the health port from outside: %v", err)
			continue
		}
		c.Close()
		if c, err := p.ext.Dial("tcp", net.JoinHostPort(host, "16000")); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("the admin port from outside: %v, want ECONNREFUSED", err)
			if err == nil {
				c.Close()
			}
		}
	}
}

// TestDrain: after SIGTERM what is open goes on to its end, and then the proxy ends with 0.
func TestDrain(t *testing.T) {
	t.Parallel()
	p := newCaptured(t, inside)
	type open struct {
		w path
		c *testnet.Conn
	}
	var all []open
	for _, w := range p.paths() {
		c, err := w.dial(w.start(echo(make(chan seen, 1))))
		if err != nil {
			t.Fatalf("%s: %v", w.name, err)
		}
		defer c.Close()
		if err := exchange(c, "before"); err != nil {
			t.Fatalf("%s: %v", w.name, err)
		}
		all = append(all, open{w, c})
	}
	p.proxy.Signal(syscall.SIGTERM)
	testnet.Wait(t, "the listeners are closed", func() bool { return !p.ns.Bound(16001) && !p.ns.Bound(16006) && !p.ns.Bound(16007) })
	for _, o := range all {
		if err := errors.Join(exchange(o.c, "after"), finish(o.c.TCPConn)); err != nil {
			t.Errorf("%s: %v", o.w.name, err)
		}
		if !p.proxy.Running() && o.w.name != all[len(all)-1].w.name {
			t.Fatalf("the proxy ended with connections open:\n%s", p.proxy.log)
		}
	}
	if err := p.proxy.Wait(); err != nil {
		t.Errorf("the proxy ended with %v, want 0", err)
	}
	for _, o := range all {
		if r := p.proxy.waitRecordOf(t, o.c); r.Reason != "ok" {
			t.Errorf("%s: record %+v, want reason ok", o.w.name, r)
		}
	}
}

// TestDrainTimeout: what is still open after it is reset.
func TestDrainTimeout(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.init()
	p.startProxy(inside, "--drain-timeout", "100ms")
	for _, w := range p.paths()[:4] {
		c, err := w.dial(w.start(echo(make(chan seen, 1))))
		if err != nil {
			t.Fatalf("%s: %v", w.name, err)
		}
		defer c.Close()
		if err := exchange(c, "before"); err != nil {
			t.Fatalf("%s: %v", w.name, err)
		}
		defer func() {
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%s: read %v, want ECONNRESET", w.name, err)
			}
			if r := p.proxy.waitRecordOf(t, c); r.Reason != "shutdown" {
				t.Errorf("%s: record %+v, want reason shutdown", w.name, r)
			}
		}()
	}
	p.proxy.Signal(syscall.SIGTERM)
	if err := p.proxy.Wait(); err != nil {
		t.Errorf("the proxy ended with %v, want 0", err)
	}
}

// TestConnectionLimit: one more than allowed is reset at once, with its reason, and does not disturb the others.
func TestConnectionLimit(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.init()
	p.startProxy(inside, "--max-connections", "2")
	w := p.paths()[0]
	to := w.start(echo(make(chan seen, 10)))
	var open []*testnet.Conn
	for range 2 {
		c, err := w.dial(to)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if err := exchange(c, "one of two"); err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	third, err := w.dial(to)
	if err == nil {
		defer third.Close()
		_, err = third.Read(make([]byte, 1))
		if r := p.proxy.waitRecordOf(t, third); r.Reason != "connection_limit" {
			t.Errorf("record %+v, want reason connection_limit", r)
		}
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("one too many: %v, want ECONNRESET", err)
	}
	for _, c := range open {
		if err := errors.Join(exchange(c, "go on"), finish(c.TCPConn)); err != nil {
			t.Error(err)
		}
	}
	testnet.Wait(t, "there is room again", func() bool {
		c, err := w.dial(to)
		if err != nil {
			return false
		}
		defer c.Close()
		return exchange(c, "again") == nil
	})
}

// TestOpenFreesThoseWaiting: connections that wait for a proxy that is stuck, with its queue full, go direct when it dies.
func TestOpenFreesThoseWaiting(t *testing.T) {
	t.Parallel()
	for i, name := range []string{"out/v4", "out/v6", "out/mapped", "in/v4", "in/v6", "in/mapped"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t)
			p.ns.Sysctl("net.core.somaxconn", "1") // of listeners made from now on: the proxy's, and the app's
			p.init("--on-proxy-down", "open", "--on-proxy-down-inbound", "open")
			p.startProxy(inside)
			w := p.paths()[i]
			p.captured(t, w)
			p.proxy.Signal(syscall.SIGSTOP)
			// One after the other, until the queue is full: together they would all be let in, and get no answer later.
			var attempts []*attempt
			waiting := map[*attempt]bool{}
			for len(waiting) == 0 {
				a := p.attempt(w)
				attempts = append(attempts, a)
				testnet.Wait(t, "it is in the queue, or waits", func() bool {
					waits := a.waits(w)
					if waits {
						waiting[a] = true
					}
					return waits || a.isDone()
				})
			}
			if len(attempts) == 1 {
				t.Fatal("nothing is in the queue: this test shows nothing")
			}
			for range 4 {
				a := p.attempt(w)
				attempts = append(attempts, a)
				waiting[a] = true
			}
			testnet.Wait(t, "the others wait", func() bool {
				for a := range waiting {
					if !a.waits(w) {
						return false
					}
				}
				return true
			})
			p.proxy.Kill()
			for _, a := range attempts {
				a.wait(t)
				if a.err == nil {
					defer a.c.Close()
					a.err = exchange(a.c, "hello")
				}
				if waiting[a] {
					if a.err != nil {
						t.Errorf("a connection that waited: %v, want it direct", a.err)
					} else if s := <-a.saw; s.peer != unmap(a.c.Own) {
						t.Errorf("a connection that waited: the server's peer is %s, want the client itself, %s", s.peer, a.c.Own)
					}
				} else if !errors.Is(a.err, syscall.ECONNRESET) && !errors.Is(a.err, syscall.EPIPE) {
					t.Errorf("a connection in the queue of the dead proxy: %v, want ECONNRESET", a.err)
				}
			}
		})
	}
}
