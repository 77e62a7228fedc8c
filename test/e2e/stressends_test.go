// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/test/testnet"
	"golang.org/x/sys/unix"
)

// stressServer is a server that knows whom its clients mean.
type stressServer struct {
	number  int
	inbound bool
	port    uint16
	v6      bool // takes IPv6 alone; the others take IPv4, or both
	victim  int  // of a process that will be killed; 0: it stays
}

// serve plays the server's side of a connection.
func (s *stress) serve(server stressServer, c *net.TCPConn) {
	begun := time.Now()
	own, peer := unmap(addrPort(c.LocalAddr())), unmap(addrPort(c.RemoteAddr()))
	plan, err := readPlan(c)
	if err != nil {
		s.headless(server, own, peer, begun, err)
		return
	}
	s.mu.Lock()
	st := s.streams[plan.ID]
	again := st != nil && st.served
	if st != nil {
		st.served = true
	}
	s.mu.Unlock()
	side := s.side(plan, "server", begun, c)
	defer s.left(side)
	switch {
	case st == nil:
		s.fail(side, "nobody has begun such a stream")
		return
	case again:
		s.fail(side, "a second connection of the same stream")
		return
	case plan.Server != server.number || plan.To != own:
		s.fail(side, "arrived at server %d as %s", server.number, own)
		return
	}
	side.begun = st.begun
	s.arrived(side, peer, s.world.since(st.begun))
	r := side.run(false)
	s.judge(side, r)
}

// headless judges a connection that ended before it said who it is: whoever opened it was cut. An end as if it were whole
// is what only a process leaves that was killed.
func (s *stress) headless(server stressServer, own, peer netip.AddrPort, begun time.Time, err error) {
	if isCut(err) || errors.Is(err, io.EOF) && s.appsDiedSince(begun.Add(-10*time.Second)) {
		s.count("cut before the first byte")
		return
	}
	side := s.side(streamPlan{To: own, Own: peer, Server: server.number, Inbound: server.inbound}, "server", begun, nil)
	defer s.left(side)
	s.fail(side, "ended before it began: %v", err)
}

// arrived checks how a connection came: in its client's name, and through the proxy, unless the policy let it pass.
func (s *stress) arrived(side *streamSide, peer netip.AddrPort, met weather) {
	p := side.plan
	ports := config.DialOutbound
	if p.Inbound {
		ports = config.DialInbound
	}
	switch {
	case peer.Addr() != p.Own.Addr():
		s.fail(side, "the server's peer is %s", peer)
	case ports.Contains(peer.Port()):
	case peer != p.Own:
		s.fail(side, "the server's peer is %s: neither the client's own port nor one of the proxy's", peer)
	case !met.down || met.of(p.Inbound)&modeOpen == 0:
		s.fail(side, "passed the sidecar by; meanwhile: %s", met)
	default:
		s.count("direct, under open")
	}
}

// judge decides whether a side may have ended as it did.
func (s *stress) judge(side *streamSide, r sideResult) {
	p := side.plan
	met := s.world.since(side.begun)
	killed := p.Victim != 0 && s.victimDied(p.Victim)
	for _, err := range []error{r.sendErr, r.recvErr} {
		switch {
		case err == nil, errors.Is(err, io.EOF), errors.Is(err, net.ErrClosed):
		case errors.Is(err, errShort) && killed: // the kernel ended the streams of a process that is gone, as it does without us
		case !isCut(err):
			s.fail(side, "sent: %v, received: %v", r.sendErr, r.recvErr)
			return
		}
	}
	if met.down || killed {
		s.count("under a disturbance")
		return
	}
	// Nothing has happened: it must have gone as planned.
	mine, theirs := endClientReset, endServerReset
	if side.name == "server" {
		mine, theirs = theirs, mine
	}
	ok := false
	switch p.Ending {
	case mine:
		ok = r.sendErr == nil && (r.recvErr == nil || errors.Is(r.recvErr, net.ErrClosed) || errors.Is(r.recvErr, io.EOF))
	case theirs:
		ok = isCut(r.recvErr) && (r.sendErr == nil || isCut(r.sendErr))
	case endClientDrops:
		if side.name == "client" {
			ok = r.sendErr == nil && (r.recvErr == nil || errors.Is(r.recvErr, io.EOF))
		} else {
			ok = (errors.Is(r.recvErr, io.EOF) || isCut(r.recvErr)) && (r.sendErr == nil || isCut(r.sendErr))
		}
	default:
		ok = r.sendErr == nil && errors.Is(r.recvErr, io.EOF)
	}
	if !ok {
		s.fail(side, "nothing has disturbed it; sent: %v, received: %v", r.sendErr, r.recvErr)
		return
	}
	s.count("as planned: " + string(p.Ending))
}

// stressRoute is a way for clients to connect.
type stressRoute struct {
	by     *testnet.Agent
	server stressServer
	to     netip.Addr
	dial   testnet.Dial
	victim int
}

// client makes one stream.
func (s *stress) client(route stressRoute, r *rand.Rand) {
	p := s.plan(route.victim, route.dial.From != "" && !strings.HasSuffix(route.dial.From, ":0"), r)
	to := netip.AddrPortFrom(route.to, route.server.port)
	p.To, p.Server, p.Inbound = to, route.server.number, route.server.inbound
	d := route.dial
	d.To = to.String()
	if p.Urgent {
		d.MPTCP = false // has no urgent data
	}
	p.Description = fmt.Sprintf("%+v", d)
	st := s.begin(p.ID)
	side := s.side(p, "client", st.begun, nil)
	defer s.left(side)
	side.note("connecting", 0, 0)
	c, err := route.by.Dial(d)
	if err != nil {
		s.refused(side, d, err)
		return
	}
	defer c.Close()
	side.mu.Lock()
	side.c, side.rand = c.TCPConn, rand.New(rand.NewPCG(p.Seed(), 1))
	side.plan.Own = unmap(c.Own)
	p = side.plan
	side.mu.Unlock()
	if unmap(c.Peer) != to {
		s.fail(side, "connected to %s", c.Peer)
	}
	if p.Urgent {
		err = inline(c.TCPConn)
	}
	if err == nil {
		err = writePlan(c, p)
	}
	if err != nil {
		s.judge(side, sideResult{sendErr: err})
		return
	}
	result := side.run(true)
	s.judge(side, result)
	s.mu.Lock()
	served := st.served
	s.mu.Unlock()
	if errors.Is(result.recvErr, io.EOF) && !served && p.Victim == 0 {
		s.fail(side, "ended well, and no server has seen it")
	}
}

// begin enters a stream. It is never forgotten: its connection may arrive when the client is gone.
func (s *stress) begin(id uint64) *stressStream {
	st := &stressStream{begun: time.Now()}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.streams[id] = st
	return st
}

// refused judges a connect that failed.
func (s *stress) refused(side *streamSide, d testnet.Dial, err error) {
	p := side.plan
	met := s.world.since(side.begun)
	died := p.Victim != 0 && s.victimDied(p.Victim)
	closed := met.down && met.of(p.Inbound)&modeClosed != 0
	switch {
	case d.From != "" && (errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EADDRINUSE)):
		s.count("the fixed port was in TIME_WAIT, as it would be without us")
	case closed && errors.Is(err, syscall.ECONNREFUSED), closed && errors.Is(err, syscall.EHOSTUNREACH):
		s.count("refused, under closed")
		time.Sleep(5 * time.Millisecond) // no use in being refused faster
	case met.down && isCut(err):
		s.count("cut while it connected")
	case died && (isCut(err) || errors.Is(err, syscall.ECONNREFUSED)):
		s.count("refused by a dead app")
	case errors.Is(err, testnet.ErrAgentGone) && s.ending():
	default:
		s.fail(side, "connect: %v; meanwhile: %s", err, met)
	}
}

// inline has urgent bytes among the others, where none can be missed.
func inline(c *net.TCPConn) error {
	return withDescriptor(c, func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) })
}

func inlineListener(ln *net.TCPListener) error {
	raw, err := ln.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_OOBINLINE, 1) })
	return errors.Join(cerr, err)
}

// Seed is that of everything random in the stream.
func (p streamPlan) Seed() uint64 { return mix(p.ID ^ 0x5eed) }

// plan draws what a stream is like: many are small, few are big.
func (s *stress) plan(victim int, again bool, r *rand.Rand) streamPlan {
	size := func() int64 {
		switch n := r.IntN(100); {
		case n < 10:
			return 0
		case n < 80:
			return r.Int64N(5000)
		case n < 98:
			return r.Int64N(1 << 20)
		default:
			return r.Int64N(12 << 20)
		}
	}
	p := streamPlan{ID: r.Uint64(), Up: size(), Down: size(), Urgent: r.IntN(8) == 0 && victim == 0, Victim: victim}
	p.Small = p.Up < 20_000 && p.Down < 20_000 && r.IntN(2) == 0
	if p.Up < 200_000 && p.Down < 200_000 {
		p.SlowClient, p.SlowServer = r.IntN(8) == 0, r.IntN(8) == 0
	}
	endings := []stressEnding{endBoth, endBoth, endClientFirst, endServerFirst, endServerFirst, endClientReset, endServerReset, endClientDrops}
	if again { // where the client ends first, its port is its kernel's for a minute, without us too
		endings = []stressEnding{endServerFirst, endServerFirst, endServerFirst, endServerFirst, endServerFirst, endClientReset, endServerReset, endBoth}
	}
	p.Ending = endings[r.IntN(len(endings))]
	switch p.Ending {
	case endClientReset:
		p.Cut = r.Int64N(p.Up + 1)
	case endServerReset, endClientDrops:
		p.Cut = r.Int64N(p.Down + 1)
	}
	return p
}
