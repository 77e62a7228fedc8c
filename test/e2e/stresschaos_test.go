// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"github.com/pillionproxy/pillion/test/testnet"
)

// setPolicy installs the capture, or replaces its policy.
func (s *stress) setPolicy(outbound, inbound modes) {
	s.t.Helper()
	s.world.change("init", func(w *weather) { w.outbound, w.inbound = w.outbound|outbound, w.inbound|inbound })
	cmd := s.initCmd("--on-proxy-down", outbound.String(), "--on-proxy-down-inbound", inbound.String())
	cmd.User = nil // replacing takes the right to detach
	if r := run(s.t, cmd); r.code != 0 {
		s.t.Fatalf("PILLION_STRESS_SEED=%d: init: exit code %d\n%s%s", s.seed, r.code, r.stdout, r.stderr)
	}
	s.world.change("init has ended", func(w *weather) { w.outbound, w.inbound = outbound, inbound })
}

// start starts a proxy.
func (s *stress) start() {
	s.t.Helper()
	proxy := s.proxyCmd(inside)
	s.log = &recentLog{}
	proxy.Stdout, proxy.Stderr = s.log, s.log
	if err := proxy.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.proxy = proxy
	defer func() {
		if s.t.Failed() {
			s.t.Logf("PILLION_STRESS_SEED=%d: the proxy that does not get ready said:\n%s", s.seed, s.log.about())
		}
	}()
	proxy.waitReady()
	s.world.clock(true)
	s.world.change("a proxy is ready", func(w *weather) { w.down = false })
}

func (s *stress) kill() {
	s.t.Helper()
	s.check() // what its log says
	if !s.proxy.Running() {
		s.t.Fatalf("PILLION_STRESS_SEED=%d: the proxy has ended by itself:\n%s", s.seed, s.log.about())
	}
	s.world.change("SIGKILL", func(w *weather) { w.down = true })
	s.world.clock(false)
	s.proxy.Kill()
}

// pause lets things happen for a random time.
func (s *stress) pause(r *rand.Rand, most time.Duration) {
	s.t.Helper()
	for left := time.Duration(r.Int64N(int64(most))); left > 0; left -= 50 * time.Millisecond {
		time.Sleep(min(left, 50*time.Millisecond))
		s.check()
	}
}

// disturb does one thing after the other.
func (s *stress) disturb(r *rand.Rand, duration time.Duration) {
	s.t.Helper()
	all := []modes{modeHold, modeOpen, modeClosed}
	policy := func() { s.setPolicy(all[r.IntN(3)], all[r.IntN(3)]) }
	for end := time.Now().Add(duration); time.Now().Before(end); {
		s.pause(r, 500*time.Millisecond)
		switch n := r.IntN(20); {
		case n < 8:
			s.count("SIGKILL of the proxy")
			s.kill()
			if r.IntN(4) > 0 {
				s.pause(r, 600*time.Millisecond)
			}
			if r.IntN(6) == 0 {
				s.count("policy changed without a proxy")
				policy()
			}
			s.start()
		case n < 12:
			s.count("SIGSTOP of the proxy")
			s.world.clock(false)
			s.proxy.Signal(syscall.SIGSTOP)
			s.pause(r, 400*time.Millisecond)
			s.proxy.Signal(syscall.SIGCONT)
			s.world.clock(true)
		case n < 15:
			s.count("policy changed")
			policy()
		default:
			s.count("app killed")
			s.killApp(r)
		}
	}
}

// rest lets everything run undisturbed.
func (s *stress) rest(duration time.Duration) {
	s.t.Helper()
	s.world.change("rest", func(*weather) {})
	for end := time.Now().Add(duration); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		s.check()
	}
}

// drain waits for the end of every stream. One that stands still ends the test before the wait does.
func (s *stress) drain() {
	s.t.Helper()
	done := make(chan struct{})
	go func() {
		s.clients.Wait()
		close(done)
	}()
	for {
		select {
		case <-done:
			if len(s.active()) == 0 {
				s.check()
				return
			}
		default:
		}
		time.Sleep(20 * time.Millisecond)
		s.check()
	}
}

// What a process that will be killed does, as operations of an agent.
var (
	victimServeOp = testnet.NewOp("stress.serve", victimServe)
	victimDialOp  = testnet.NewOp("stress.dial", victimDial)
)

// victimServe serves streams in the agent, until it is killed, and returns the port.
func victimServe(network string) (uint16, error) {
	ln, err := net.Listen(network, ":0") // as Go programs do, with MPTCP
	if err != nil {
		return 0, err
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go victimSide(c.(*net.TCPConn))
		}
	}()
	return addrPort(ln.Addr()).Port(), nil
}

func victimSide(c *net.TCPConn) {
	p, err := readPlan(c)
	if err != nil {
		c.Close()
		return
	}
	side := &streamSide{plan: p, c: c, tick: func() time.Duration { return 0 }, rand: rand.New(rand.NewPCG(p.Seed(), 2))}
	side.run(false)
}

// victimDial makes one stream in the agent.
func victimDial(p streamPlan) (string, error) {
	c, err := net.Dial("tcp", p.To.String())
	if err != nil {
		return "", err
	}
	defer c.Close()
	p.Own = unmap(addrPort(c.LocalAddr()))
	if err := writePlan(c, p); err != nil {
		return "", err
	}
	side := &streamSide{plan: p, c: c.(*net.TCPConn), tick: func() time.Duration { return 0 }, rand: rand.New(rand.NewPCG(p.Seed(), 1))}
	r := side.run(true)
	return fmt.Sprintf("sent: %v, received: %v", r.sendErr, r.recvErr), nil
}

// killApp starts an app that serves and connects, and kills it in the midst of that.
func (s *stress) killApp(r *rand.Rand) {
	s.t.Helper()
	app := s.ns.Agent(s.appCG)
	s.mu.Lock()
	s.victims = append(s.victims, time.Time{})
	number := len(s.victims)
	s.mu.Unlock()
	v6 := r.IntN(2) == 0
	network, to := "tcp4", pod4
	if v6 {
		network, to = "tcp6", pod6
	}
	port, err := victimServeOp.Call(app, network)
	if err != nil {
		s.t.Fatal(err)
	}
	server := stressServer{number: 1000 + number, inbound: true, v6: v6, port: port, victim: number}
	for range 6 {
		mine, apps := rand.New(rand.NewPCG(r.Uint64(), 0)), rand.New(rand.NewPCG(r.Uint64(), 0))
		route := stressRoute{by: s.world4, server: server, to: netip.MustParseAddr(to), victim: number}
		s.clients.Go(func() {
			for !s.stop.Load() && !s.victimDied(number) {
				s.client(route, mine)
			}
		})
		s.clients.Go(func() { s.victimClient(app, number, v6, apps) })
	}
	s.pause(r, 600*time.Millisecond)
	s.mu.Lock()
	s.victims[number-1] = time.Now()
	s.mu.Unlock()
	app.Kill()
}

// victimClient makes streams in an app, to the servers of the world, until the app is gone.
func (s *stress) victimClient(app *testnet.Agent, number int, v6 bool, r *rand.Rand) {
	for !s.stop.Load() {
		server := s.servers[r.IntN(len(s.servers)/2)*2]
		if server.v6 != v6 {
			continue
		}
		to := netip.AddrPortFrom(netip.MustParseAddr(server4), server.port)
		if v6 {
			to = netip.AddrPortFrom(netip.MustParseAddr(server6), server.port)
		}
		p := s.plan(number, false, r)
		p.To, p.Server, p.Description = to, server.number, "by an app that will be killed"
		s.begin(p.ID)
		result, err := victimDialOp.Call(app, p)
		if errors.Is(err, testnet.ErrAgentGone) {
			return
		}
		if strings.Contains(result, errContent.Error()) || strings.Contains(result, errShort.Error()) {
			side := s.side(p, "client", time.Now(), nil)
			s.fail(side, "%s", result)
			s.left(side)
		}
		if err != nil {
			time.Sleep(5 * time.Millisecond) // no use in being refused faster
		}
	}
}

// victimDied reports whether the process was killed, or is just about to be.
func (s *stress) victimDied(number int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.victims[number-1].IsZero()
}

// appsDiedSince reports whether any app was killed since a moment.
func (s *stress) appsDiedSince(from time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, died := range s.victims {
		if died.After(from) {
			return true
		}
	}
	return false
}
