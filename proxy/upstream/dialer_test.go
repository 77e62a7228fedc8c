// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/proxy/telemetry"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
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

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func TestDialsComeFromTheirClientAndOurRange(t *testing.T) {
	needRoot(t)
	for _, tt := range []struct {
		name, at, client string
		dial             func(*Dialer) func(context.Context, Client) (*Conn, error)
		source           string
		ports            config.PortRange
		mark             uint32 // of the client
		want             uint32 // of the dial
		redirected       bool
	}{
		{"outbound", "127.0.0.1:0", "127.0.0.7:40000", outbound, "127.0.0.7", outRange, 0, 0, false},
		{"outbound, marked by app and capture", "127.0.0.1:0", "127.0.0.7:40000", outbound, "127.0.0.7", outRange, 5 | config.Slot(1).Mark(config.RoleReply), 5, false},
		{"outbound, with another slot's mark", "127.0.0.1:0", "127.0.0.7:40000", outbound, "127.0.0.7", outRange, config.Slot(0).Mark(config.RoleOut), config.Slot(0).Mark(config.RoleOut), false},
		{"outbound, IPv6", "[::1]:0", "[::1]:40000", outbound, "::1", outRange, 0, 0, false},
		{"outbound, redirected", "127.0.0.1:0", "127.0.0.7:40000", outbound, "127.0.0.7", outRange, 5, 5, true},
		{"inbound", "127.0.0.1:0", "127.0.0.9:40000", inbound, "127.0.0.9", inRange, 77, config.Slot(1).Mark(config.RoleDial), false},
		{"inbound, IPv6", "[::1]:0", "[::1]:40000", inbound, "::1", inRange, 0, config.Slot(1).Mark(config.RoleDial), false},
		{"inbound, redirected", "127.0.0.1:0", "127.0.0.9:40000", inbound, "127.0.0.1", inRange, 77, 0, true},
		{"inbound, redirected, IPv6", "[::1]:0", "[2001:db8::9]:40000", inbound, "::1", inRange, 0, 0, true},
		{"inbound from our own address", "127.0.0.1:0", "127.0.0.9:40000", inboundOwn, "127.0.0.1", outRange, 77, config.Slot(1).Mark(config.RoleProxy), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			to, accepted := server(t, tt.at)
			d, log := testDialer(t)
			c, err := tt.dial(d)(t.Context(), fakeClient{remote: ap(tt.client), local: to, mark: tt.mark, redirected: tt.redirected})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Abort()
			far := (<-accepted).RemoteAddr().(*net.TCPAddr).AddrPort()
			if far != c.Local() || far.Addr().String() != tt.source || !tt.ports.Contains(far.Port()) {
				t.Errorf("the server saw %s (we: %s); want %s and a port of %s", far, c.Local(), tt.source, tt.ports)
			}
			if got := c.Mark(); got != tt.want {
				t.Errorf("mark %#x, want %#x", got, tt.want)
			}
			if log.Len() > 0 {
				t.Errorf("logged: %s", log)
			}
		})
	}
}

func outbound(d *Dialer) func(context.Context, Client) (*Conn, error)   { return d.Outbound }
func inbound(d *Dialer) func(context.Context, Client) (*Conn, error)    { return d.Inbound }
func inboundOwn(d *Dialer) func(context.Context, Client) (*Conn, error) { return d.InboundOwn }

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
			c, err := d.Outbound(t.Context(), fakeClient{remote: ap("127.0.0.7:40000"), local: tt.to, device: tt.device})
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

func TestConnectTimeout(t *testing.T) {
	// A listener whose queue is full drops SYNs: a black hole.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	to := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(sa.(*unix.SockaddrInet4).Port))
	filler, err := net.Dial("tcp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	defer filler.Close()

	d, _ := testDialer(t)
	d.timeout = 50 * time.Millisecond
	_, err = d.Outbound(t.Context(), fakeClient{remote: ap("127.0.0.7:40000"), local: to})
	if e, ok := errors.AsType[*Error](err); !ok || e.Reason != telemetry.UpstreamConnectTimeout {
		t.Errorf("%v; want a connect timeout", err)
	}
	d.timeout = time.Minute
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(20*time.Millisecond, cancel)
	_, err = d.Outbound(ctx, fakeClient{remote: ap("127.0.0.7:40000"), local: to})
	if e, ok := errors.AsType[*Error](err); !ok || e.Reason != telemetry.Shutdown {
		t.Errorf("%v; want that the dial was given up", err)
	}
}

func TestPortsOfTheRangeRunOut(t *testing.T) {
	to, _ := server(t, "127.0.0.1:0")
	other, _ := server(t, "127.0.0.1:0")
	d, _ := testDialer(t)
	client := fakeClient{remote: ap("127.0.0.7:40000"), local: to}
	var conns []*Conn
	for range outRange.Len() {
		c, err := d.Outbound(t.Context(), client)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Abort()
		conns = append(conns, c)
	}
	_, err := d.Outbound(t.Context(), client)
	if e, ok := errors.AsType[*Error](err); !ok || e.Reason != telemetry.PortsExhausted {
		t.Errorf("%v; want that the ports are exhausted", err)
	}
	c, err := d.Outbound(t.Context(), fakeClient{remote: client.remote, local: other})
	if err != nil {
		t.Fatalf("to another destination: %v; want that the ports can be used again", err)
	}
	c.Abort()
	conns[2].Abort()
	c, err = d.Outbound(t.Context(), client)
	if err != nil || c.Local() != conns[2].Local() {
		t.Fatalf("after one was closed: %v", err)
	}
	c.Abort()
}

func TestAListenerInTheRangeIsSteppedOver(t *testing.T) {
	for port := outRange.First; port < outRange.Last; port++ {
		server(t, netip.AddrPortFrom(netip.IPv4Unspecified(), port).String())
	}
	to, _ := server(t, "127.0.0.1:0")
	d, _ := testDialer(t)
	c, err := d.Outbound(t.Context(), fakeClient{remote: ap("127.0.0.7:40000"), local: to})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Abort()
	if c.Local().Port() != outRange.Last {
		t.Errorf("dialled from port %d, want %d, the one that is free", c.Local().Port(), outRange.Last)
	}
}

func TestADialNeverConnectsToItself(t *testing.T) {
	d, _ := testDialer(t)
	to := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), outRange.First+1)
	for range 2 * outRange.Len() {
		c, err := d.Outbound(t.Context(), fakeClient{remote: ap("127.0.0.1:40000"), local: to})
		if err == nil {
			c.Abort()
			t.Fatalf("connected to %s from %s, where nobody listens", c.Remote(), c.Local())
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
	_, err := d.Outbound(t.Context(), fakeClient{remote: ap("198.51.100.1:40000"), local: to})
	if errors.Is(err, unix.EADDRNOTAVAIL) {
		t.Error(err)
	}
}

// onThreadOfItsOwn runs f on a thread that ends with it, so that f may change what belongs to the thread.
func onThreadOfItsOwn(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		f()
	}()
	<-done
}

// withoutCapabilities runs f on a thread that has none.
func withoutCapabilities(t *testing.T, f func()) {
	onThreadOfItsOwn(func() {
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&header, &none[0]); err != nil {
			t.Error(err)
			return
		}
		f()
	})
}

// TestRedirectedConnectionsTakeNoCapability: they are dialled for as ever, and nothing is said to be lost, but the mark of
// an app that has one.
func TestRedirectedConnectionsTakeNoCapability(t *testing.T) {
	needRoot(t)
	for _, tt := range []struct {
		name   string
		dial   func(*Dialer) func(context.Context, Client) (*Conn, error)
		mark   uint32
		source string
		ports  config.PortRange
		says   string
	}{
		{"outbound", outbound, 0, "127.0.0.7", outRange, ""},
		{"outbound, marked", outbound, 5, "127.0.0.7", outRange, "packet marks"},
		{"inbound", inbound, 5, "127.0.0.1", inRange, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			to, accepted := server(t, "127.0.0.1:0")
			d, log := testDialer(t)
			withoutCapabilities(t, func() {
				c, err := tt.dial(d)(t.Context(), fakeClient{remote: ap("127.0.0.7:40000"), local: to, mark: tt.mark, redirected: true})
				if err != nil {
					t.Error(err)
					return
				}
				defer c.Abort()
				<-accepted
				if c.Local().Addr().String() != tt.source || !tt.ports.Contains(c.Local().Port()) {
					t.Errorf("dialled from %s, want %s and a port of %s", c.Local(), tt.source, tt.ports)
				}
			})
			if got := log.String(); tt.says == "" && got != "" || !strings.Contains(got, tt.says) {
				t.Errorf("logged %q, want %q", got, tt.says)
			}
		})
	}
}

func TestNoRoute(t *testing.T) {
	needRoot(t)
	d, _ := testDialer(t)
	onThreadOfItsOwn(func() {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		_, err := d.Outbound(t.Context(), fakeClient{remote: ap("192.0.2.1:40000"), local: ap("192.0.2.2:80")})
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
			c, err := d.Inbound(t.Context(), fakeClient{remote: ap("198.51.100.1:40000"), local: to})
			if err != nil {
				t.Error(err)
				return
			}
			if c.Local().Addr() != to.Addr() || !outRange.Contains(c.Local().Port()) {
				t.Errorf("dialled from %s, want the app's own address and a port of %s", c.Local(), outRange)
			}
			<-accepted
			c.Abort()
		}
	})
	if n := strings.Count(log.String(), "in its client's name"); n != 1 {
		t.Errorf("said %d times that the client's name is lost, want once:\n%s", n, log)
	}
	if n := strings.Count(log.String(), "packet marks"); n != 1 {
		t.Errorf("said %d times that marks are lost, want once:\n%s", n, log)
	}
}

func TestOwnDialsAreKnownUntilTheyAreClosed(t *testing.T) {
	to, accepted := server(t, "127.0.0.1:0")
	d, _ := testDialer(t)
	c, err := d.Outbound(t.Context(), fakeClient{remote: ap("127.0.0.7:40000"), local: to})
	if err != nil {
		t.Fatal(err)
	}
	<-accepted
	back := fakeClient{remote: c.Local(), local: c.Remote()}
	if own, _ := d.Own(fakeClient{remote: c.Local(), local: ap("127.0.0.1:9")}); own {
		t.Error("a connection from the same port to another destination is taken for the dial")
	}
	if c.Captured() {
		t.Error("captured before it came back")
	}
	if own, probe := d.Own(back); !own || probe || !c.Captured() {
		t.Errorf("own %v, probe %v, captured %v; want a captured dial", own, probe, c.Captured())
	}
	c.Abort()
	if own, _ := d.Own(back); own {
		t.Error("still known after it was closed")
	}
}

func TestProbe(t *testing.T) {
	to, accepted := server(t, "127.0.0.1:0")
	d, _ := testDialer(t)
	c, captured, err := d.Probe(t.Context(), netip.MustParseAddr("127.0.0.7"), to)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Abort()
	(<-accepted).CloseWrite()
	if _, _, err := c.Recv(); err != io.EOF {
		t.Errorf("Recv: %v", err)
	}
	select {
	case <-captured:
		t.Error("captured without having come back")
	default:
	}
	for range 2 { // a loop may bring it back more than once
		if own, probe := d.Own(fakeClient{remote: c.Local(), local: c.Remote()}); !own || !probe {
			t.Errorf("own %v, probe %v; want a probe", own, probe)
		}
	}
	<-captured
}
