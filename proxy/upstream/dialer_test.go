// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/proxy/loop"
	"github.com/pillionproxy/pillion/proxy/telemetry"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("PILLION_REQUIRE_ROOT") == "1" {
		t.Fatal("needs root")
	}
	t.Skip("needs root")
}

// fakeClient is an accepted connection that nobody accepted.
type fakeClient struct {
	remote, local netip.AddrPort
	mark          uint32
	device        int
	redirected    bool
}

func (c fakeClient) Remote() netip.AddrPort { return c.remote }
func (c fakeClient) Local() netip.AddrPort  { return c.local }
func (c fakeClient) Redirected() bool       { return c.redirected }
func (c fakeClient) Mark() uint32           { return c.mark }
func (c fakeClient) Device() int            { return c.device }

// ranges of the tests: narrow, and away from the defaults.
var (
	outRange = config.PortRange{First: 15100, Last: 15103}
	inRange  = config.PortRange{First: 15110, Last: 15113}
)

func testDialer(t *testing.T) (*Dialer, *bytes.Buffer) {
	var log bytes.Buffer
	cfg := config.DefaultProxy()
	cfg.Slot = 1
	cfg.DialOutbound, cfg.DialInbound = outRange, inRange
	cfg.ConnectTimeout = 5 * time.Second
	return New(cfg, slog.New(slog.NewTextHandler(&log, nil))), &log
}

// server listens at addr and hands on what it accepts.
func server(t *testing.T, addr string) (netip.AddrPort, <-chan *net.TCPConn) {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(t.Context(), "tcp", addr)
	if err != nil {
		t.Skip(err)
	}
	conns, done := make(chan *net.TCPConn, 64), make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns <- c.(*net.TCPConn)
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
		close(conns)
		for c := range conns {
			c.SetLinger(0)
			c.Close()
		}
	})
	return l.Addr().(*net.TCPAddr).AddrPort(), conns
}

// dialFunc is one of the ways in which a Dialer dials.
type dialFunc = func(*Dialer, *loop.Loop, Client) (*Conn, error)

// dialled is a connection as seen from outside of its loop.
type dialled struct {
	*Conn
	local, remote netip.AddrPort
	mark          uint32
}

// dial dials on a loop.
func dial(t *testing.T, d *Dialer, how dialFunc, c Client) (*dialled, error) {
	t.Helper()
	return dialContext(t.Context(), t, d, how, c)
}

func dialContext(ctx context.Context, t *testing.T, d *Dialer, how dialFunc, c Client) (conn *dialled, err error) {
	t.Helper()
	rerr := loops(t).Run(ctx, func(l *loop.Loop) {
		var u *Conn
		if u, err = how(d, l, c); err != nil {
			return
		}
		conn = &dialled{Conn: u, local: u.Local(), remote: u.Remote()}
		_ = u.Control(func(fd int) error {
			mark, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK)
			conn.mark = uint32(mark)
			return err
		})
	})
	if rerr != nil {
		t.Fatal(rerr)
	}
	return conn, err
}

// close resets it, also at the end of the test.
func (c *dialled) close() { c.Loop().Do(c.Abort) }

// loops is a group that ends with the test.
func loops(t *testing.T) *loop.Group {
	t.Helper()
	g, err := loop.New(loop.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.Close)
	return g
}

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func TestDialsComeFromTheirClientAndOurRange(t *testing.T) {
	needRoot(t)
	for _, tt := range []struct {
		name, at, client string
		dial             dialFunc
		source           string
		ports            config.PortRange
		mark             uint32 // of the client
		want             uint32 // of the dial
		redirected       bool
	}{
		{"outbound", "127.0.0.1:0", "127.0.0.7:40000", (*Dialer).Outbound, "127.0.0.7", outRange, 0, 0, false},
		{"outbound, marked by app and capture", "127.0.0.1:0", "127.0.0.7:40000", (*Dialer).Outbound, "127.0.0.7", outRange, 5 | config.Slot(1).Mark(config.RoleReply), 5, false},
		{"outbound, with another slot's mark", "127.0.0.1:0", "127.0.0.7:40000", (*Dialer).Outbound, "127.0.0.7", outRange, config.Slot(0).Mark(config.RoleOut), config.Slot(0).Mark(config.RoleOut), false},
		{"outbound, IPv6", "[::1]:0", "[::1]:40000", (*Dialer).Outbound, "::1", outRange, 0, 0, false},
		{"outbound, redirected", "127.0.0.1:0", "127.0.0.7:40000", (*Dialer).Outbound, "127.0.0.7", outRange, 5, 5, true},
		{"inbound", "127.0.0.1:0", "127.0.0.9:40000", (*Dialer).Inbound, "127.0.0.9", inRange, 77, config.Slot(1).Mark(config.RoleDial), false},
		{"inbound, IPv6", "[::1]:0", "[::1]:40000", (*Dialer).Inbound, "::1", inRange, 0, config.Slot(1).Mark(config.RoleDial), false},
		{"inbound, redirected", "127.0.0.1:0", "127.0.0.9:40000", (*Dialer).Inbound, "127.0.0.1", inRange, 77, 0, true},
		{"inbound, redirected, IPv6", "[::1]:0", "[2001:db8::9]:40000", (*Dialer).Inbound, "::1", inRange, 0, 0, true},
		{"inbound from our own address", "127.0.0.1:0", "127.0.0.9:40000", (*Dialer).InboundOwn, "127.0.0.1", outRange, 77, config.Slot(1).Mark(config.RoleProxy), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			to, accepted := server(t, tt.at)
			d, log := testDialer(t)
			c, err := dial(t, d, tt.dial, fakeClient{remote: ap(tt.client), local: to, mark: tt.mark, redirected: tt.redirected})
			if err != nil {
				t.Fatal(err)
			}
			defer c.close()
			far := (<-accepted).RemoteAddr().(*net.TCPAddr).AddrPort()
			if far != c.local || far.Addr().String() != tt.source || !tt.ports.Contains(far.Port()) {
				t.Errorf("the server saw %s (we: %s); want %s and a port of %s", far, c.local, tt.source, tt.ports)
			}
			if got := c.mark; got != tt.want {
				t.Errorf("mark %#x, want %#x", got, tt.want)
			}
			if log.Len() > 0 {
				t.Errorf("logged: %s", log)
			}
		})
	}
}

func TestDialFailures(t *testing.T) {
	needRoot(t)
	refused, _ := server(t, "127.0.0.1:0")
	for _, tt := range []struct {
		name   string
		to     netip.AddrPort
		device int
		want   telemetry.Reason
		is     error
	}{
		{"nobody listens", netip.AddrPortFrom(refused.Addr(), 1), 0, telemetry.UpstreamConnectRefused, unix.ECONNREFUSED},
		{"no such device", refused, 1 << 20, telemetry.UpstreamUnreachable, unix.ENODEV},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, _ := testDialer(t)
			c, err := dial(t, d, (*Dialer).Outbound, fakeClient{remote: ap("127.0.0.7:40000"), local: tt.to, device: tt.device})
			if c != nil {
				t.Fatal("connected")
			}
			e, ok := errors.AsType[*Error](err)
			if !ok || e.Reason != tt.want || !errors.Is(err, tt.is) {
				t.Errorf("%v (reason %v), want %s", err, e, tt.want)
			}
			if n := d.remembered(); n != 0 {
				t.Errorf("%d dials are remembered, want none", n)
			}
		})
	}
}

func (d *Dialer) remembered() (n int) {
	for i := range d.own {
		n += len(d.own[i].dials)
	}
	return n
}

// blackHole is a listener whose queue is full, so that it drops SYNs.
func blackHole(t *testing.T) netip.AddrPort {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	to := loop.AddrPort(sa)
	filler, err := net.Dial("tcp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { filler.Close() })
	return to
}

func TestConnectTimeout(t *testing.T) {
	to := blackHole(t)
	d, _ := testDialer(t)
	d.timeout = 50 * time.Millisecond
	_, err := dial(t, d, (*Dialer).Outbound, fakeClient{remote: ap("127.0.0.7:40000"), local: to})
	if e, ok := errors.AsType[*Error](err); !ok || e.Reason != telemetry.UpstreamConnectTimeout {
		t.Errorf("%v; want a connect timeout", err)
	}
	d.timeout = time.Minute
	gone := errors.New("no more")
	ctx, cancel := context.WithCancelCause(t.Context())
	time.AfterFunc(20*time.Millisecond, func() { cancel(gone) })
	_, err = dialContext(ctx, t, d, (*Dialer).Outbound, fakeClient{remote: ap("127.0.0.7:40000"), local: to})
	if !errors.Is(err, gone) {
		t.Errorf("%v; want that the dial was given up", err)
	}
	if n := d.remembered(); n != 0 {
		t.Errorf("%d dials are remembered, want none", n)
	}
}

func TestPortsOfTheRangeRunOut(t *testing.T) {
	to, _ := server(t, "127.0.0.1:0")
	other, _ := server(t, "127.0.0.1:0")
	d, _ := testDialer(t)
	client := fakeClient{remote: ap("127.0.0.7:40000"), local: to}
	var conns []*dialled
	for range outRange.Len() {
		c, err := dial(t, d, (*Dialer).Outbound, client)
		if err != nil {
			t.Fatal(err)
		}
		defer c.close()
		conns = append(conns, c)
	}
	_, err := dial(t, d, (*Dialer).Outbound, client)
	if e, ok := errors.AsType[*Error](err); !ok || e.Reason != telemetry.PortsExhausted {
		t.Errorf("%v; want that the ports are exhausted", err)
	}
	c, err := dial(t, d, (*Dialer).Outbound, fakeClient{remote: client.remote, local: other})
	if err != nil {
		t.Fatalf("to another destination: %v; want that the ports can be used again", err)
	}
	c.close()
	conns[2].close()
	c, err = dial(t, d, (*Dialer).Outbound, client)
	if err != nil || c.local != conns[2].local {
		t.Fatalf("after one was closed: %v", err)
	}
	c.close()
}

func TestAListenerInTheRangeIsSteppedOver(t *testing.T) {
	for port := outRange.First; port < outRange.Last; port++ {
		server(t, netip.AddrPortFrom(netip.IPv4Unspecified(), port).String())
	}
	to, _ := server(t, "127.0.0.1:0")
	d, _ := testDialer(t)
	c, err := dial(t, d, (*Dialer).Outbound, fakeClient{remote: ap("127.0.0.7:40000"), local: to})
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	if c.local.Port() != outRange.Last {
		t.Errorf("dialled from port %d, want %d, the one that is free", c.local.Port(), outRange.Last)
	}
}

func TestADialNeverConnectsToItself(t *testing.T) {
	d, _ := testDialer(t)
	to := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), outRange.First+1)
	for range 2 * outRange.Len() {
		c, err := dial(t, d, (*Dialer).Outbound, fakeClient{remote: ap("127.0.0.1:40000"), local: to})
		if err == nil {
			c.close()
			t.Fatalf("connected to %s from %s, where nobody listens", c.remote, c.local)
		}
		if !errors.Is(err, unix.ECONNREFUSED) {
			t.Fatal(err)
		}
	}
}

func TestAForeignSourceAddressIsKept(t *testing.T) {
	needRoot(t)
	to, _ := server(t, "127.0.0.1:0")
	d, _ := testDialer(t)
	d.timeout = 50 * time.Millisecond
	// The answer to such an address goes elsewhere, so that the dial times out; without the address it could not even bind.
	_, err := dial(t, d, (*Dialer).Outbound, fakeClient{remote: ap("198.51.100.1:40000"), local: to})
	if errors.Is(err, unix.EADDRNOTAVAIL) {
		t.Error(err)
	}
}

// inProcessOfItsOwn runs f in another process that runs this test, for what changes all of it: there, it first calls begin.
func inProcessOfItsOwn(t *testing.T, attr *syscall.SysProcAttr, begin func() error, f func()) {
	t.Helper()
	const mine = "PILLION_TEST_PROCESS"
	if os.Getenv(mine) == t.Name() {
		if err := begin(); err != nil {
			t.Fatal(err)
		}
		f()
		return
	}
	var pattern []string
	for name := range strings.SplitSeq(t.Name(), "/") {
		pattern = append(pattern, "^"+regexp.QuoteMeta(name)+"$")
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.v", "-test.run="+strings.Join(pattern, "/"))
	cmd.Env = append(os.Environ(), mine+"="+t.Name())
	cmd.SysProcAttr = attr
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
		t.Errorf("%v\n%s", err, out)
	}
}

// withoutCapabilities runs f in a process that has none.
func withoutCapabilities(t *testing.T, f func()) {
	t.Helper()
	inProcessOfItsOwn(t, nil, func() error { return cap.NewSet().SetProc() }, f)
}

// TestRedirectedConnectionsTakeNoCapability: they are dialled for as ever, and nothing is said to be lost, but the mark of
// an app that has one.
func TestRedirectedConnectionsTakeNoCapability(t *testing.T) {
	needRoot(t)
	for _, tt := range []struct {
		name   string
		dial   dialFunc
		mark   uint32
		source string
		ports  config.PortRange
		says   string
	}{
		{"outbound", (*Dialer).Outbound, 0, "127.0.0.7", outRange, ""},
		{"outbound, marked", (*Dialer).Outbound, 5, "127.0.0.7", outRange, "packet marks"},
		{"inbound", (*Dialer).Inbound, 5, "127.0.0.1", inRange, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			to, accepted := server(t, "127.0.0.1:0")
			d, log := testDialer(t)
			withoutCapabilities(t, func() {
				c, err := dial(t, d, tt.dial, fakeClient{remote: ap("127.0.0.7:40000"), local: to, mark: tt.mark, redirected: true})
				if err != nil {
					t.Error(err)
					return
				}
				defer c.close()
				<-accepted
				if c.local.Addr().String() != tt.source || !tt.ports.Contains(c.local.Port()) {
					t.Errorf("dialled from %s, want %s and a port of %s", c.local, tt.source, tt.ports)
				}
				if got := log.String(); tt.says == "" && got != "" || !strings.Contains(got, tt.says) {
					t.Errorf("logged %q, want %q", got, tt.says)
				}
			})
		})
	}
}

func TestNoRoute(t *testing.T) {
	needRoot(t)
	d, _ := testDialer(t)
	own := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	inProcessOfItsOwn(t, own, func() error { return nil }, func() {
		_, err := dial(t, d, (*Dialer).Outbound, fakeClient{remote: ap("192.0.2.1:40000"), local: ap("192.0.2.2:80")})
		if e, ok := errors.AsType[*Error](err); !ok || e.Reason != telemetry.UpstreamUnreachable {
			t.Errorf("%v; want unreachable", err)
		}
	})
}

func TestWithoutTheRightToTheClientsNameInboundSaysSoOnce(t *testing.T) {
	needRoot(t)
	to, accepted := server(t, "127.0.0.1:0")
	d, log := testDialer(t)
	withoutCapabilities(t, func() {
		for range 2 {
			c, err := dial(t, d, (*Dialer).Inbound, fakeClient{remote: ap("198.51.100.1:40000"), local: to})
			if err != nil {
				t.Error(err)
				return
			}
			if c.local.Addr() != to.Addr() || !outRange.Contains(c.local.Port()) {
				t.Errorf("dialled from %s, want the app's own address and a port of %s", c.local, outRange)
			}
			<-accepted
			c.close()
		}
		if n := strings.Count(log.String(), "in its client's name"); n != 1 {
			t.Errorf("said %d times that the client's name is lost, want once:\n%s", n, log)
		}
		if n := strings.Count(log.String(), "packet marks"); n != 1 {
			t.Errorf("said %d times that marks are lost, want once:\n%s", n, log)
		}
	})
}

func TestOwnDialsAreKnownUntilTheyAreClosed(t *testing.T) {
	to, accepted := server(t, "127.0.0.1:0")
	d, _ := testDialer(t)
	c, err := dial(t, d, (*Dialer).Outbound, fakeClient{remote: ap("127.0.0.7:40000"), local: to})
	if err != nil {
		t.Fatal(err)
	}
	<-accepted
	back := fakeClient{remote: c.local, local: c.remote}
	if own, _ := d.Own(fakeClient{remote: c.local, local: ap("127.0.0.1:9")}); own {
		t.Error("a connection from the same port to another destination is taken for the dial")
	}
	if c.Captured() {
		t.Error("captured before it came back")
	}
	if own, probe := d.Own(back); !own || probe || !c.Captured() {
		t.Errorf("own %v, probe %v, captured %v; want a captured dial", own, probe, c.Captured())
	}
	c.close()
	if own, _ := d.Own(back); own {
		t.Error("still known after it was closed")
	}
}

func TestProbe(t *testing.T) {
	to, accepted := server(t, "127.0.0.1:0")
	d, _ := testDialer(t)
	p, err := d.Probe(t.Context(), loops(t), netip.MustParseAddr("127.0.0.7"), to)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if far := (<-accepted).RemoteAddr().(*net.TCPAddr).AddrPort(); far != p.Local {
		t.Errorf("the server saw %s, we %s", far, p.Local)
	}
	select {
	case <-p.Captured:
		t.Error("captured without having come back")
	default:
	}
	for range 2 { // a loop may bring it back more than once
		if own, probe := d.Own(fakeClient{remote: p.Local, local: to}); !own || !probe {
			t.Errorf("own %v, probe %v; want a probe", own, probe)
		}
	}
	<-p.Captured
}

func TestAProbeIsGivenUp(t *testing.T) {
	d, _ := testDialer(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := d.Probe(ctx, loops(t), netip.MustParseAddr("127.0.0.7"), blackHole(t)); !errors.Is(err, context.Canceled) {
		t.Errorf("%v; want that it was cancelled", err)
	}
	if n := d.remembered(); n != 0 {
		t.Errorf("%d dials are remembered, want none", n)
	}
}
