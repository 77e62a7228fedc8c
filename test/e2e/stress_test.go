// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/test/testnet"
)

// stress is one run of the stress driver. Clients make streams of every kind, without end; meanwhile the proxy is killed
// and stopped, policies change, and apps die. What must hold is in judge, arrived, refused, headless and stuck.
type stress struct {
	t *testing.T
	*pod
	seed    uint64
	world   *stressWorld
	log     *recentLog // of the proxy that is there now
	world4  *testnet.Agent
	servers []stressServer
	stop    atomic.Bool // no new streams
	over    atomic.Bool // the run has failed, and is taken down
	clients sync.WaitGroup

	mu      sync.Mutex
	streams map[uint64]*stressStream
	sides   map[*streamSide]struct{}
	counts  map[string]int
	failed  string // the first failure
	victims []time.Time
}

// stressStream is what the servers must know of a stream.
type stressStream struct {
	begun  time.Time
	served bool
}

// patient is how long a stream may stand still while the proxy is able to carry it. The longest that is due to be waited
// for is the retransmission of a SYN that met several dead proxies.
const patient = 45 * time.Second

// TestStress mixes everything at random: PILLION_STRESS_TIME (a duration) says for how long, PILLION_STRESS_SEED repeats
// the choices of another run.
func TestStress(t *testing.T) {
	duration := 5 * time.Second
	if text := os.Getenv("PILLION_STRESS_TIME"); text != "" {
		var err error
		if duration, err = time.ParseDuration(text); err != nil {
			t.Fatalf("PILLION_STRESS_TIME: %v", err)
		}
	} else {
		t.Parallel()
	}
	seed := rand.Uint64()
	if text := os.Getenv("PILLION_STRESS_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("PILLION_STRESS_SEED: %v", err)
		}
	}
	t.Logf("PILLION_STRESS_SEED=%d PILLION_STRESS_TIME=%s", seed, duration)
	s := newStress(t, seed)
	baseline := s.weigh()
	workers := 16
	if duration > time.Minute {
		workers = 32
	}
	routes := s.routes()
	for i := range workers {
		// Each has ports of its own, which it uses again and again.
		s.clients.Go(func() { s.clientLoop(rand.New(rand.NewPCG(seed, uint64(i))), routes, uint16(10_000+10*i)) })
	}
	s.disturb(rand.New(rand.NewPCG(seed, 1<<32)), duration*4/5)
	s.rest(duration / 5)
	s.stop.Store(true)
	s.drain()
	s.compare(baseline)
	for _, w := range s.paths() {
		// The policy may be any: a proxy is there.
		saw := make(chan seen, 1)
		c, err := w.dial(w.start(echo(saw)))
		if err != nil {
			t.Fatalf("afterwards: %s: %v", w.name, err)
		}
		if err := exchange(c, "afterwards"); err != nil {
			t.Errorf("afterwards: %s: %v", w.name, err)
		}
		c.Close()
		if server := <-saw; !w.ports.Contains(server.peer.Port()) {
			t.Errorf("afterwards: %s: the server's peer is %s, want a port of %s", w.name, server.peer, w.ports)
		}
	}
	s.report()
}

func newStress(t *testing.T, seed uint64) *stress {
	s := &stress{
		t: t, pod: newPod(t), seed: seed,
		streams: map[uint64]*stressStream{}, sides: map[*streamSide]struct{}{}, counts: map[string]int{},
	}
	s.addNIC()
	s.world4 = s.ext.Agent(nil)
	s.world = newStressWorld(weather{down: true, outbound: modeHold, inbound: modeHold})
	s.setPolicy(modeHold, modeHold)
	s.start()
	for number := range 8 {
		server := stressServer{number: number, inbound: number%2 == 1, v6: number&2 != 0}
		network, addr := "tcp4", "0.0.0.0:0"
		if server.v6 {
			network, addr = "tcp6", "[::]:0"
		}
		var ln *net.TCPListener
		if server.inbound {
			if server.number == 1 { // takes both families
				network, addr = "tcp", "[::]:0"
			}
			var err error
			if ln, err = s.app.Listen(network, addr); err != nil {
				t.Fatal(err)
			}
		} else {
			ln = s.ext.Listen(network, addr)
		}
		if err := inlineListener(ln); err != nil {
			t.Fatal(err)
		}
		server.port = addrPort(ln.Addr()).Port()
		testnet.Serve(t, ln, func(c *net.TCPConn) { s.serve(server, c) })
		s.servers = append(s.servers, server)
	}
	// At the end of a run that has failed, everything that waits is cut, so that its goroutine ends.
	t.Cleanup(func() {
		s.over.Store(true)
		s.stop.Store(true)
		s.app.Kill()
		s.world4.Kill()
		for side := range s.active() {
			side.abort()
		}
		s.clients.Wait()
	})
	return s
}

// routes are all ways to connect to the servers that stay.
func (s *stress) routes() (routes []stressRoute) {
	for _, server := range s.servers {
		by, hosts, sources := s.app, []string{server4, beyond4, client4}, []string{pod4, second4}
		devices := []string{"eth0", "eth1"}
		switch {
		case server.inbound && server.v6:
			by, hosts, sources, devices = s.world4, []string{pod6, second6, other6}, []string{client6, server6}, nil
		case server.inbound:
			by, hosts, sources, devices = s.world4, []string{pod4, second4, other4}, []string{client4, server4}, nil
		case server.v6:
			hosts, sources = []string{server6, beyond6, client6}, []string{pod6, second6}
		}
		for _, host := range hosts {
			to := netip.MustParseAddr(host)
			plain := stressRoute{by: by, server: server, to: to}
			routes = append(routes, plain, plain, plain)
			with := func(f func(d *testnet.Dial)) {
				route := plain
				f(&route.dial)
				routes = append(routes, route)
			}
			with(func(d *testnet.Dial) { d.NonBlock = true })
			with(func(d *testnet.Dial) { d.MPTCP = true })
			for _, source := range sources {
				with(func(d *testnet.Dial) { d.From, d.Reuse = net.JoinHostPort(source, "0"), true })
				with(func(d *testnet.Dial) { d.From, d.Reuse, d.NonBlock = net.JoinHostPort(source, "fixed"), true, true })
			}
			if to.Is4() && !server.inbound {
				with(func(d *testnet.Dial) { d.Mapped = true })
			}
			if len(devices) > 0 && host != server4 && host != server6 {
				device := devices[0]
				if host == beyond4 || host == beyond6 {
					device = devices[1]
				}
				with(func(d *testnet.Dial) { d.Device = device })
				with(func(d *testnet.Dial) { d.Device, d.NonBlock = device, true })
			}
		}
	}
	return routes
}

// clientLoop makes one stream after the other. Now and then it is one of a few that have a fixed port at the client's end,
// so that what the last one left behind is met.
func (s *stress) clientLoop(r *rand.Rand, routes []stressRoute, ports uint16) {
	var again []stressRoute
	for len(again) < 8 {
		route := routes[r.IntN(len(routes))]
		if host, ok := strings.CutSuffix(route.dial.From, ":fixed"); ok {
			route.dial.From = fmt.Sprintf("%s:%d", host, ports+uint16(r.IntN(4)))
			again = append(again, route)
		}
	}
	for !s.stop.Load() {
		route := routes[r.IntN(len(routes))]
		if r.IntN(4) == 0 || strings.HasSuffix(route.dial.From, ":fixed") {
			route = again[r.IntN(len(again))]
			s.count("from a port used before")
		}
		s.client(route, r)
	}
}

// side enters one end of a stream into the list of those under way.
func (s *stress) side(p streamPlan, name string, begun time.Time, c *net.TCPConn) *streamSide {
	side := &streamSide{plan: p, name: name, begun: begun, c: c, tick: s.world.uptime, rand: rand.New(rand.NewPCG(p.Seed(), 2))}
	side.note("begun", 0, 0)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sides[side] = struct{}{}
	return side
}

func (s *stress) left(side *streamSide) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sides, side)
}

func (s *stress) active() map[*streamSide]struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make(map[*streamSide]struct{}, len(s.sides))
	for side := range s.sides {
		all[side] = struct{}{}
	}
	return all
}

func (s *stress) count(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts[what]++
}

func (s *stress) ending() bool { return s.over.Load() }

// report says what the run was made of. A run without whole streams of each ending has shown little.
func (s *stress) report() {
	s.mu.Lock()
	defer s.mu.Unlock()
	var what []string
	for name := range s.counts {
		what = append(what, name)
	}
	slices.Sort(what)
	for _, name := range what {
		s.t.Logf("%8d %s", s.counts[name], name)
	}
	for _, e := range []stressEnding{endBoth, endClientFirst, endServerFirst, endClientReset, endServerReset, endClientDrops} {
		if s.counts["as planned: "+string(e)] == 0 {
			s.t.Errorf("no stream of which %q ended as planned: this run shows little", e)
		}
	}
}
