// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/test/testnet"
)

// policies are a failure policy for each direction.
type policies struct{ outbound, inbound string }

func (m policies) of(w path) string {
	if w.direction == "inbound" {
		return m.inbound
	}
	return m.outbound
}

// TestProxyDown goes through a proxy's life under each policy, in each place: before it starts, while it runs, after it
// is killed under load, after it is started again; and once more with a proxy that is older than the capture.
func TestProxyDown(t *testing.T) {
	for _, mode := range []policies{{"hold", "hold"}, {"open", "open"}, {"closed", "closed"}, {"closed", "open"}} {
		for _, where := range placements {
			for _, older := range []bool{false, true} {
				if mode.outbound != mode.inbound && (older || where == outside) {
					continue // that the two are told apart needs no more than one life
				}
				t.Run(fmt.Sprintf("out %s, in %s/%s/proxy older than the capture: %v", mode.outbound, mode.inbound, where, older), func(t *testing.T) {
					t.Parallel()
					proxyLife(t, mode, where, older)
				})
			}
		}
	}
}

func proxyLife(t *testing.T, mode policies, where placement, older bool) {
	p := newPod(t)
	install := func() { p.init("--on-proxy-down", mode.outbound, "--on-proxy-down-inbound", mode.inbound) }
	if older {
		var args []string
		if where == outside {
			// Init sees listeners, but with its two capabilities not whose they are, unless by their user: one that the
			// world can reach would keep it from capturing a pod in which processes run already.
			args = []string{"--health", "[::1]:16020"}
		}
		p.startProxy(where, args...)
		install()
	} else {
		install()
		held := p.down(t, mode, "never started")
		p.startProxy(where)
		p.release(t, held)
	}
	for _, w := range p.paths() {
		p.captured(t, w)
	}
	loads := p.startLoad(t)
	p.proxy.Kill()
	held := p.down(t, mode, "killed under load")
	p.startProxy(where)
	p.release(t, held)
	loads.finish(t)
	for _, w := range p.paths() {
		p.captured(t, w)
	}
}

// TestKilledAgainAndAgain: whatever the moment of the kill, no connection ends as if it were whole, gets a wrong answer, or
// waits for ever.
func TestKilledAgainAndAgain(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.init()
	p.startProxy(inside)
	l := p.startLoad(t)
	for range 6 {
		p.proxy.Kill()
		p.startProxy(inside)
		enough := l.total() + 100
		testnet.Wait(t, "the new proxy carries connections", func() bool { return l.total() >= enough })
	}
	l.finish(t)
	for _, w := range p.paths() {
		p.captured(t, w)
	}
}

// attempt is a connect under way.
type attempt struct {
	w    path
	to   netip.AddrPort
	saw  chan seen
	done chan struct{}
	c    *testnet.Conn
	err  error
	took time.Duration
}

func (p *pod) attempt(w path) *attempt {
	a := &attempt{w: w, saw: make(chan seen, 1), done: make(chan struct{})}
	a.to = w.start(echo(a.saw))
	go func() {
		defer close(a.done)
		start := time.Now()
		a.c, a.err = w.dial(a.to)
		a.took = time.Since(start)
	}()
	return a
}

// isDone reports whether the connect has ended.
func (a *attempt) isDone() bool {
	select {
	case <-a.done:
		return true
	default:
		return false
	}
}

// waits reports whether its SYN was sent again.
func (a *attempt) waits(w path) bool {
	for _, s := range w.clientNS.Sockets() {
		if s.State == testnet.SynSent && s.Retransmits > 0 && unmap(s.Remote) == a.to {
			return true
		}
	}
	return false
}

// wait waits for the end of the connect. A connect that is held by no proxy does not end before the kernel gives it up,
// after more than two minutes; the deadline lies before that.
func (a *attempt) wait(t *testing.T) {
	t.Helper()
	select {
	case <-a.done:
	case <-time.After(time.Minute):
		t.Fatalf("%s: the connect to %s has not ended", a.w.name, a.to)
	}
}

// down checks what becomes of new connections while there is no proxy. Under `hold` they go on waiting, and are returned.
func (p *pod) down(t *testing.T, mode policies, when string) (held []*attempt) {
	t.Helper()
	var attempts []*attempt
	for _, w := range p.paths() {
		attempts = append(attempts, p.attempt(w))
	}
	for _, a := range attempts {
		switch mode.of(a.w) {
		case "hold":
			held = append(held, a)
		case "open":
			a.wait(t)
			if a.err != nil {
				t.Errorf("%s, %s: %v, want a direct connection", when, a.w.name, a.err)
				continue
			}
			if err := errors.Join(exchange(a.c, "direct"), finish(a.c.TCPConn)); err != nil {
				t.Errorf("%s, %s: %v", when, a.w.name, err)
				continue
			}
			if s := <-a.saw; s.peer != unmap(a.c.Own) {
				t.Errorf("%s, %s: the server's peer is %s, want the client itself, %s", when, a.w.name, s.peer, a.c.Own)
			}
			t.Logf("%s, %s: connected directly in %s", when, a.w.name, a.took)
		case "closed":
			a.wait(t)
			want := syscall.EHOSTUNREACH
			if a.w.direction == "inbound" {
				want = syscall.ECONNREFUSED // a reset: see facts-connect.md row 17
			}
			if !errors.Is(a.err, want) {
				t.Errorf("%s, %s: %v, want %v", when, a.w.name, a.err, want)
			}
			t.Logf("%s, %s: failed in %s", when, a.w.name, a.took)
		}
	}
	for _, a := range held {
		a.w.clientNS.WaitSocket(t, fmt.Sprintf("%s, %s: the SYN is repeated", when, a.w.name), func(s testnet.Socket) bool {
			select {
			case <-a.done:
				t.Fatalf("%s, %s: the connect has ended (%v) without a proxy", when, a.w.name, a.err)
			default:
			}
			return s.State == testnet.SynSent && unmap(s.Remote) == a.to && s.Retransmits > 0
		})
	}
	return held
}

// release checks that connections which were held are carried by the proxy that is there now.
func (p *pod) release(t *testing.T, held []*attempt) {
	t.Helper()
	for _, a := range held {
		a.wait(t)
		if a.err != nil {
			t.Errorf("%s: %v, want it connected once the proxy is up", a.w.name, a.err)
			continue
		}
		p.wentThrough(t, a.w, a.c, a.to, a.saw)
	}
}

// loads is traffic on every path, with one connection each that stays.
type loads struct {
	stop    atomic.Bool
	wg      sync.WaitGroup
	mu      sync.Mutex
	wrong   []string // what must never be: a wrong answer, or an end where more was due
	failed  int
	ok      map[string]*atomic.Int64
	streams []*stream
}

// stream is a download under way.
type stream struct {
	name           string
	client, server chan error // how it ended at either side
}

// startLoad returns once every path has carried connections and its stream flows.
func (p *pod) startLoad(t *testing.T) *loads {
	t.Helper()
	l := &loads{ok: map[string]*atomic.Int64{}}
	var flowing sync.WaitGroup
	for _, w := range p.paths() { // whole before the first goroutine reads it
		l.ok[w.name] = &atomic.Int64{}
	}
	for _, w := range p.paths() {
		to := w.start(func(c *net.TCPConn) { _, _ = io.Copy(c, c) })
		l.wg.Go(func() { l.connectLoop(w, to) })

		s := &stream{name: w.name, client: make(chan error, 1), server: make(chan error, 1)}
		from := w.start(func(c *net.TCPConn) {
			for {
				if _, err := c.Write(make([]byte, 1000)); err != nil {
					s.server <- err
					return
				}
				time.Sleep(time.Millisecond) // a download that never ends needs no more
			}
		})
		c, err := w.dial(from)
		if err != nil {
			t.Fatalf("%s: %v", w.name, err)
		}
		t.Cleanup(func() { c.Close() })
		flowing.Add(1)
		go func() {
			_, err := io.CopyN(io.Discard, c, 10_000)
			flowing.Done()
			for b := make([]byte, 1000); err == nil; {
				_, err = c.Read(b)
			}
			s.client <- err
		}()
		l.streams = append(l.streams, s)
	}
	flowing.Wait()
	testnet.Wait(t, "every path carries connections", func() bool {
		for _, n := range l.ok {
			if n.Load() < 10 {
				return false
			}
		}
		return true
	})
	return l
}

// total counts the connections that were right.
func (l *loads) total() (n int64) {
	for _, ok := range l.ok {
		n += ok.Load()
	}
	return n
}

func (l *loads) connectLoop(w path, to netip.AddrPort) {
	for i := 0; !l.stop.Load(); i++ {
		c, err := w.dial(to)
		if err == nil {
			err = errors.Join(exchange(c, fmt.Sprintf("%s number %d", w.name, i)), finish(c.TCPConn))
			c.Close()
		}
		switch {
		case err == nil:
			l.ok[w.name].Add(1)
		case errors.As(err, new(syscall.Errno)):
			l.mu.Lock()
			l.failed++
			l.mu.Unlock()
			time.Sleep(time.Millisecond) // `closed` fails faster than is useful
		default:
			l.mu.Lock()
			l.wrong = append(l.wrong, fmt.Sprintf("%s number %d: %v", w.name, i, err))
			l.mu.Unlock()
		}
	}
}

// finish ends the load. What was cut by the kill must have ended as a reset at both sides, never as if it were whole.
func (l *loads) finish(t *testing.T) {
	t.Helper()
	l.stop.Store(true)
	l.wg.Wait()
	for _, s := range l.streams {
		if err := <-s.client; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: a download was cut, and its client read %v, want ECONNRESET", s.name, err)
		}
		if err := <-s.server; !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
			t.Errorf("%s: a download was cut, and its server got %v, want ECONNRESET or EPIPE", s.name, err)
		}
	}
	if len(l.wrong) > 0 {
		t.Errorf("%d connections ended wrongly, the first: %s", len(l.wrong), l.wrong[0])
	}
	for name, n := range l.ok {
		t.Logf("%s: %d connections", name, n.Load())
	}
	t.Logf("%d connections failed with an error, as they may when the proxy is killed", l.failed)
}

// TestSecondProxy: there can be one listener for each port. The second proxy says so and ends; the first goes on.
func TestSecondProxy(t *testing.T) {
	t.Parallel()
	for _, where := range placements {
		t.Run(string(where), func(t *testing.T) {
			p := newCaptured(t, where)
			r := run(t, p.proxyCmd(where).Cmd)
			if r.code == 0 {
				t.Errorf("the second proxy ended with 0")
			}
			wantFault(t, r, r.code, "16001", "in use")
			for _, w := range p.paths() {
				p.captured(t, w)
			}
		})
	}
}
