// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Probe proves a capture by real connections. It must run in a process inside the captured cgroup, with the capabilities
// of the installer; package bootstrap starts one.
//
// Each connection is made to a listener of the probe's own (the decoy), on an address of this host. Not captured, it
// arrives there from the very port that was dialled from. Captured, it arrives at the proxy's listener, or, where a proxy
// runs, at the decoy from a port of the proxy's. So both answers come as a connection, none as silence. Where no proxy
// runs, the probe borrows its port, with a filter on it that drops every SYN but the probe's own: a connection of anybody
// else waits as if nobody listened.
type Probe struct {
	config.Shared
	ProxyUID uint32 `json:"proxy_uid"`
}

// probeTimeout bounds one connection. All of them stay on this host, so only a silent drop ever meets it.
const probeTimeout = 5 * time.Second

// Run makes every proof that this host allows.
func (p Probe) Run(ctx context.Context) ([]redirect.Check, error) {
	addresses, err := ownAddresses()
	if err != nil {
		return nil, err
	}
	injector, err := newInjector(p.Slot)
	if err != nil {
		return nil, err
	}
	defer injector.Close()
	var checks []redirect.Check
	for _, f := range []redirect.Family{redirect.IPv4, redirect.IPv6} {
		own := addresses[f]
		if len(own) == 0 {
			checks = append(checks, redirect.Check{Family: f, Direction: "outbound", OK: true, Detail: "no address of this family: nothing to capture"})
			continue
		}
		c, err := p.family(ctx, f, own, injector)
		checks = append(checks, c...)
		if err != nil {
			return checks, err
		}
	}
	return checks, nil
}

func (p Probe) family(ctx context.Context, f redirect.Family, own []ownAddress, injector *injector) ([]redirect.Check, error) {
	// Open for all proofs: under `open` and `closed` the hooks look for it at every connect.
	out, err := borrow(f, p.Listeners.Outbound)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	in, err := borrow(f, p.Listeners.Inbound)
	if err != nil {
		return nil, err
	}
	defer in.Close()

	checks := []redirect.Check{
		p.routed(f),
		p.outbound(ctx, f, own[0].Addr, out),
		p.proxys(ctx, f, own[0].Addr),
	}
	for _, a := range own {
		if a.Neighbour.IsValid() {
			checks = append(checks, p.inbound(ctx, f, a, in, injector))
		}
	}
	return checks, nil
}

// routed asks the kernel where it would send a captured packet to an address that is nobody's. The connections of the
// other proofs go to own addresses, which are delivered on this host whatever the rules say.
func (p Probe) routed(f redirect.Family) redirect.Check {
	check := redirect.Check{Family: f, Direction: "route"}
	to := nobody(f).AsSlice()
	routes, err := netlink.RouteGetWithOptions(to, &netlink.RouteGetOptions{Mark: p.Slot.Mark(config.RoleOut)})
	if err == nil && len(routes) > 0 {
		check.OK = routes[0].Type == unix.RTN_LOCAL
	}
	return concluded(check, nil, "a captured packet is delivered on this host", fmt.Sprintf("a captured packet does not reach lo (asked for %s): %v", nobody(f), cmp.Or(err, errElsewhere)))
}

var errElsewhere = errors.New("other rules send it elsewhere; see `ip rule`")

func (p Probe) outbound(ctx context.Context, f redirect.Family, own netip.Addr, out *borrowed) redirect.Check {
	check := redirect.Check{Family: f, Direction: "outbound"}
	err := p.try(ctx, &check, trial{Target: own, From: loopbackOf(f), Borrowed: out})
	return concluded(check, err, "an app's connection is taken", "an app's connection passes uncaptured")
}

// proxys proves that a dial of the proxy's user is left alone.
func (p Probe) proxys(ctx context.Context, f redirect.Family, own netip.Addr) redirect.Check {
	check := redirect.Check{Family: f, Direction: "proxy"}
	err := p.try(ctx, &check, trial{Target: own, From: loopbackOf(f), UID: p.ProxyUID})
	if errors.Is(err, errNoSetuid) {
		check.OK, check.Detail = true, "not tried: it takes CAP_SETUID; the proxy proves it by itself at its start"
		return check
	}
	check.OK = !check.OK // here the decoy must have got it directly
	return concluded(check, err, "the proxy's own connection is left alone", "the proxy's own connection is captured: it would go round in circles")
}

func (p Probe) inbound(ctx context.Context, f redirect.Family, a ownAddress, in *borrowed, injector *injector) redirect.Check {
	check := redirect.Check{Family: f, Direction: "inbound", Interface: a.Link}
	t := trial{Target: a.Addr, From: a.Neighbour, Ports: p.DialInbound, Borrowed: in, Mark: p.Slot.Mark(config.RoleDial)}
	t.Before = func(port uint16) error { return injector.Arm(port, a.Index, a.MAC) }
	err := p.try(ctx, &check, t)
	if errors.Is(err, errSilence) {
		// Neither the proxy's listener nor the app's got it: something else drops what comes in on this port.
		check.OK = true
		check.Detail = "not proven: the connection was dropped on its way in, by a packet filter or by rp_filter"
		return check
	}
	return concluded(check, err, "a connection to an app's listener is taken", "a connection to an app's listener passes uncaptured")
}

func concluded(c redirect.Check, err error, yes, no string) redirect.Check {
	switch {
	case err != nil:
		c.OK, c.Detail = false, err.Error()
	case c.OK:
		c.Proven, c.Detail = true, yes
	default:
		c.Proven, c.Detail = true, no
	}
	return c
}

// trial is one connection.
type trial struct {
	Target   netip.Addr // of the decoy
	From     netip.Addr
	Ports    config.PortRange   // to dial from; none: any
	Mark     uint32             // of the dialling socket; non-zero also makes it transparent
	UID      uint32             // that makes the dialling socket, if not 0
	Borrowed *borrowed          // the proxy's listener; nil: nobody is expected there
	Before   func(uint16) error // called with the port that is dialled from, before the SYN
}

var (
	errNoSetuid = errors.New("set the user id of a socket: operation not permitted")
	errSilence  = errors.New("no answer: neither the proxy's listener nor the app's got the connection")
)

// try makes the connection and sets check.OK to whether it was captured.
func (p Probe) try(ctx context.Context, check *redirect.Check, t trial) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	decoy, err := listen(ctx, netip.AddrPortFrom(t.Target, 0), nil)
	if err != nil {
		return fmt.Errorf("listen on %s: %w", t.Target, err)
	}
	defer decoy.Close()
	sock, from, err := dialSocket(t)
	if err != nil {
		return err
	}
	defer unix.Close(sock)
	// Closed by a reset: a connection from ::1 to a global address whose far end closes first is not ended by TIME_WAIT's
	// ACK, which Linux loses on the way; it would stay in LAST_ACK for minutes.
	if err := unix.SetsockoptLinger(sock, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return fmt.Errorf("set SO_LINGER: %w", err)
	}
	if t.Before != nil {
		if err := t.Before(from.Port()); err != nil {
			return err
		}
	}
	listeners := []*net.TCPListener{decoy}
	if t.Borrowed != nil && t.Borrowed.l != nil {
		if err := t.Borrowed.Admit(from.Port()); err != nil {
			return err
		}
		listeners = append(listeners, t.Borrowed.l)
	}
	arrivals := accept(listeners)
	defer arrivals.Stop()
	target := decoy.Addr().(*net.TCPAddr).AddrPort()
	if err := connect(ctx, sock, target); err != nil {
		if errors.Is(err, context.DeadlineExceeded) {
			return errSilence
		}
		return fmt.Errorf("connect %s to %s: %w", from, target, err)
	}
	token := []byte(rand.Text())
	if _, err := unix.Write(sock, token); err != nil {
		return fmt.Errorf("send through the capture: %w", err)
	}
	select {
	case a := <-arrivals.C:
		defer a.conn.Close()
		check.OK = a.listener != decoy || a.from() != from
		return a.expect(ctx, token)
	case <-ctx.Done():
		return errSilence
	}
}

// dialSocket makes a bound, non-blocking socket for the trial.
func dialSocket(t trial) (fd int, from netip.AddrPort, err error) {
	if fd, err = socketAs(t.UID, t.From); err != nil {
		return -1, from, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if t.Mark != 0 {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(t.Mark)); err != nil {
			return -1, from, fmt.Errorf("set SO_MARK: %w", err)
		}
		if err := transparent(fd, t.From); err != nil {
			return -1, from, err
		}
	}
	if err := bind(fd, t.From, t.Ports); err != nil {
		return -1, from, fmt.Errorf("bind to %s: %w", t.From, err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return -1, from, fmt.Errorf("getsockname: %w", err)
	}
	return fd, addrPort(sa), nil
}

// bind takes a free port of the range, the last ones first: the proxy begins with the first ones.
func bind(fd int, a netip.Addr, ports config.PortRange) error {
	for port := ports.Last; ; port-- {
		err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(a, port)))
		if !errors.Is(err, unix.EADDRINUSE) || port == ports.First {
			return err
		}
	}
}

// socketAs makes a TCP socket whose maker is the user uid, if that is not 0. The user id is the thread's own while it
// lasts; the effective one, and with it every capability, stays.
func socketAs(uid uint32, of netip.Addr) (int, error) {
	family := unix.AF_INET
	if of.Is6() {
		family = unix.AF_INET6
	}
	if uid != 0 {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		was := unix.Getuid()
		if err := setThreadUID(int(uid)); err != nil {
			return -1, errNoSetuid
		}
		defer setThreadUID(was)
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	return fd, nil
}

// setThreadUID sets the real user id of this thread alone; unix.Setresuid would set that of all.
func setThreadUID(uid int) error {
	keep := ^uintptr(0)
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), keep, keep); errno != 0 {
		return errno
	}
	return nil
}

// connect waits until the handshake is done.
func connect(ctx context.Context, fd int, to netip.AddrPort) error {
	err := unix.Connect(fd, sockaddr(to))
	for errors.Is(err, unix.EINPROGRESS) || errors.Is(err, unix.EINTR) {
		deadline, _ := ctx.Deadline()
		left := time.Until(deadline)
		if left <= 0 {
			return context.DeadlineExceeded
		}
		n, perr := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, int(left.Milliseconds())+1)
		switch {
		case errors.Is(perr, unix.EINTR):
			continue
		case perr != nil:
			return perr
		case n == 0:
			return context.DeadlineExceeded
		}
		soerr, gerr := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if gerr != nil {
			return gerr
		}
		if soerr != 0 {
			return unix.Errno(soerr)
		}
		return nil
	}
	return err
}

// arrival is a connection that one of the listeners got.
type arrival struct {
	listener *net.TCPListener
	conn     *net.TCPConn
}

func (a arrival) from() netip.AddrPort {
	ap := a.conn.RemoteAddr().(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}

// expect reads the token: the connection is the probe's, and its bytes come through.
func (a arrival) expect(ctx context.Context, token []byte) error {
	if deadline, ok := ctx.Deadline(); ok {
		a.conn.SetReadDeadline(deadline)
	}
	got := make([]byte, len(token))
	if _, err := io.ReadFull(a.conn, got); err != nil {
		return fmt.Errorf("the connection arrived, but not what was sent through it: %w", err)
	}
	if string(got) != string(token) {
		return errors.New("a foreign connection arrived in place of the probe's")
	}
	return nil
}

// acceptor accepts on several listeners; the first arrival is what counts.
type acceptor struct {
	C    chan arrival
	done []chan struct{}
	ls   []*net.TCPListener
}

func accept(listeners []*net.TCPListener) *acceptor {
	a := &acceptor{C: make(chan arrival, len(listeners)), ls: listeners}
	for _, l := range listeners {
		done := make(chan struct{})
		a.done = append(a.done, done)
		l.SetDeadline(time.Time{})
		go a.acceptOne(l, done)
	}
	return a
}

func (a *acceptor) acceptOne(l *net.TCPListener, done chan struct{}) {
	defer close(done)
	if c, err := l.AcceptTCP(); err == nil {
		a.C <- arrival{l, c}
	}
}

// Stop ends the accepting and waits for it; connections that nobody took are closed.
func (a *acceptor) Stop() {
	for i, l := range a.ls {
		l.SetDeadline(time.Unix(1, 0))
		<-a.done[i]
	}
	for {
		select {
		case late := <-a.C:
			late.conn.Close()
		default:
			return
		}
	}
}
