// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/proxy/listen"
	"github.com/pillionproxy/pillion/proxy/loop"
	"github.com/pillionproxy/pillion/proxy/telemetry"
	"github.com/pillionproxy/pillion/proxy/upstream"
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

// testConfig has ports that are chosen, and dial ranges away from the defaults.
func testConfig() Config {
	cfg := Config{Proxy: config.DefaultProxy(), Log: slog.New(slog.DiscardHandler)}
	cfg.Listeners = config.Listeners{}
	cfg.Admin = netip.MustParseAddrPort("127.0.0.1:0")
	cfg.Health = netip.MustParseAddrPort("127.0.0.1:0")
	cfg.DialOutbound = config.PortRange{First: 15200, Last: 15299}
	cfg.DialInbound = config.PortRange{First: 15300, Last: 15399}
	return cfg
}

// sink keeps what an access log or an Observer is told.
type sink struct {
	mu     sync.Mutex
	closed []telemetry.Connection
	news   chan struct{}
}

func newSink() *sink { return &sink{news: make(chan struct{}, 1024)} }

func (*sink) Opened(telemetry.Connection) {}

func (s *sink) Closed(c telemetry.Connection) {
	s.mu.Lock()
	s.closed = append(s.closed, c)
	s.mu.Unlock()
	s.news <- struct{}{}
}

// next is the next connection to end.
func (s *sink) next(t *testing.T) telemetry.Connection {
	t.Helper()
	select {
	case <-s.news:
	case <-time.After(10 * time.Second):
		t.Fatal("no connection ends")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.closed[0]
	s.closed = s.closed[1:]
	return c
}

// TestListenThatFails closes what it was given.
func TestListenThatFails(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for name, spoil := range map[string]func(*Config, *os.File){
		"what is no socket for datagrams": func(cfg *Config, null *os.File) { cfg.Datagrams.Listeners = append(cfg.Datagrams.Listeners, null) },
		"a port that is taken":            func(cfg *Config, _ *os.File) { cfg.Admin = netip.MustParseAddrPort(taken.Addr().String()) },
	} {
		t.Run(name, func(t *testing.T) {
			outbound, err := listen.OpenAt(netip.MustParseAddrPort("127.0.0.1:0"))
			if err != nil {
				t.Fatal(err)
			}
			udp, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
			if err != nil {
				t.Fatal(err)
			}
			defer udp.Close()
			file, err := udp.File()
			if err != nil {
				t.Fatal(err)
			}
			null, err := os.Open(os.DevNull)
			if err != nil {
				t.Fatal(err)
			}
			cfg := testConfig()
			cfg.Outbound, cfg.Datagrams.Listeners = outbound, []*os.File{file}
			spoil(&cfg, null)
			if s, err := Listen(cfg); err == nil {
				s.Close()
				t.Fatal("it does not fail")
			}
			_ = udp.Close() // ours; if the other is open, too, its port is still taken
			again, err := net.ListenUDP("udp", udp.LocalAddr().(*net.UDPAddr))
			if err != nil {
				t.Errorf("the listener for datagrams is open: %v", err)
			} else {
				again.Close()
			}
			if c, err := net.Dial("tcp", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), outbound.Port()).String()); err == nil {
				c.Close()
				t.Error("the listener for connections is open")
			}
			_ = null.Close() // where Listen did not take it
		})
	}
}

// start serves until the test ends, or until stop, which returns when Serve has.
func start(t *testing.T, cfg Config) (s *Server, seen *sink, stop func()) {
	t.Helper()
	needRoot(t)
	seen = newSink()
	cfg.Observer = seen
	s, err := Listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan struct{})
	go func() {
		defer close(served)
		if err := s.Serve(ctx); err != nil {
			t.Errorf("Serve: %v", err)
		}
	}()
	stop = func() {
		cancel()
		<-served
	}
	t.Cleanup(func() {
		s.Close()
		stop()
	})
	return s, seen, stop
}

// eventually waits until the condition holds.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("never: " + what)
		}
	}
}

func dial(t *testing.T, addr string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

func loopback(port uint16) string {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port).String()
}

func wantReset(t *testing.T, c *net.TCPConn) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("read %d, %v; want a reset", n, err)
	}
}

// wantResetOf connects, which must be answered by a reset, then or after.
func wantResetOf(t *testing.T, addr string) {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if errors.Is(err, unix.ECONNRESET) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	wantReset(t, c.(*net.TCPConn))
}

// captured is a client as the capture would hand it over: it meant another address.
type captured struct{ from, meant netip.AddrPort }

func (c captured) Remote() netip.AddrPort { return c.from }
func (c captured) Local() netip.AddrPort  { return c.meant }
func (captured) Redirected() bool         { return false }
func (captured) Mark() uint32             { return 0 }
func (captured) Device() int              { return 0 }

// carry lets the server's route handle a connection that its client meant for meant, and returns the client's end.
func carry(t *testing.T, r *route, meant netip.AddrPort) *net.TCPConn {
	t.Helper()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client := dial(t, l.Addr().String())
	accepted, err := l.(*net.TCPListener).AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	if !r.live.Enter() {
		t.Fatal("no room")
	}
	if err := r.loops.Run(t.Context(), func(l *loop.Loop) {
		c, err := l.Adopt(accepted)
		if err != nil {
			t.Error(err)
			return
		}
		from := c.Remote()
		c.Start(func(c *loop.Conn) { r.handle(c, captured{from, meant}) })
	}); err != nil {
		t.Fatal(err)
	}
	return client
}

// echo answers with what it was sent, and ends when its client does.
func echo(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				defer c.Close()
				io.Copy(c, c)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		serving.Wait()
	})
	return l.Addr().(*net.TCPAddr).AddrPort()
}

func TestCarriesBothDirections(t *testing.T) {
	s, seen, _ := start(t, testConfig())
	to := echo(t)
	for d, ports := range map[telemetry.Direction]config.PortRange{
		telemetry.Outbound: testConfig().DialOutbound, telemetry.Inbound: testConfig().DialInbound,
	} {
		client := carry(t, s.routes()[d], to)
		io.WriteString(client, "hello")
		client.CloseWrite()
		if got, err := io.ReadAll(client); err != nil || string(got) != "hello" {
			t.Errorf("%s: %q, %v", d, got, err)
		}
		c := seen.next(t)
		if c.Direction != d || c.Reason != telemetry.OK || c.Error != "" || c.Sent != 5 || c.Received != 5 ||
			c.Destination != to || c.Source.String() != client.LocalAddr().String() || !ports.Contains(c.Upstream.Port()) {
			t.Errorf("%s: recorded %+v", d, c)
		}
	}
}

func TestReasons(t *testing.T) {
	s, seen, _ := start(t, testConfig())
	r := s.routes()[telemetry.Outbound]
	t.Run("refused", func(t *testing.T) {
		wantReset(t, carry(t, r, netip.MustParseAddrPort("127.0.0.1:1")))
		if c := seen.next(t); c.Reason != telemetry.UpstreamConnectRefused || c.Error == "" {
			t.Errorf("%+v", c)
		}
	})
	t.Run("client resets", func(t *testing.T) {
		client := carry(t, r, echo(t))
		client.Write([]byte("x"))
		client.Read(make([]byte, 1))
		client.SetLinger(0)
		client.Close()
		if c := seen.next(t); c.Reason != telemetry.ClientReset {
			t.Errorf("%+v", c)
		}
	})
	t.Run("server resets", func(t *testing.T) {
		l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		client := carry(t, r, l.Addr().(*net.TCPAddr).AddrPort())
		server, err := l.AcceptTCP()
		if err != nil {
			t.Fatal(err)
		}
		server.SetLinger(0)
		server.Close()
		wantReset(t, client)
		if c := seen.next(t); c.Reason != telemetry.UpstreamReset {
			t.Errorf("%+v", c)
		}
	})
	t.Run("own listener", func(t *testing.T) {
		for _, port := range []uint16{s.Listeners().Outbound, s.Listeners().Inbound, s.Listeners().InboundOwn} {
			wantResetOf(t, loopback(port))
			if c := seen.next(t); c.Reason != telemetry.OwnListener {
				t.Errorf("port %d: %+v", port, c)
			}
		}
	})
	t.Run("client vanishes in the dial", func(t *testing.T) {
		client := carry(t, r, blackHole(t))
		eventually(t, "the dial begins", func() bool { return len(s.Live()) == 1 })
		client.SetLinger(0)
		client.Close()
		if c := seen.next(t); c.Reason != telemetry.ClientReset {
			t.Errorf("%+v", c)
		}
	})
}

// blackHole is an address at which SYNs are dropped: a listener with a full queue.
func blackHole(t *testing.T) netip.AddrPort {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	at := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(sa.(*unix.SockaddrInet4).Port))
	dial(t, at.String())
	return at
}

func TestAnOwnDialThatComesBackIsCutAndReadinessSaysSo(t *testing.T) {
	s, seen, _ := start(t, testConfig())
	eventually(t, "ready", func() bool { return s.Ready() == nil })
	// As if the outbound listener were captured traffic's true destination: the dial that the proxy makes arrives there.
	r := s.routes()[telemetry.Outbound]
	wantReset(t, carry(t, r, netip.MustParseAddrPort(loopback(s.Listeners().Outbound))))
	if c := seen.next(t); c.Reason != telemetry.OwnListener { // the first guard
		t.Errorf("%+v", c)
	}
	blind := &Server{book: s.book, dialer: s.dialer, live: s.live, loops: s.loops, doubt: s.doubt} // it knows no own listener
	blind.outbound, blind.inbound, blind.inboundOwn = &listen.Listener{}, &listen.Listener{}, &listen.Listener{}
	r.Server = blind
	wantReset(t, carry(t, r, netip.MustParseAddrPort(loopback(s.Listeners().Outbound))))
	for range 2 { // the dial that came back, and the connection that it was for
		if c := seen.next(t); c.Reason != telemetry.OwnDialCaptured {
			t.Errorf("%+v", c)
		}
	}
	if err := s.Ready(); err == nil || !strings.Contains(err.Error(), "own dial captured") || config.HintOf(err) == "" {
		t.Errorf("ready: %v; want that an own dial was captured, with a hint", err)
	}
	s.doubted(captured{from: netip.MustParseAddrPort("127.0.0.1:1"), meant: echo(t)}) // the last one that came back
	eventually(t, "ready again, since that dial comes through", func() bool { return s.Ready() == nil })
}

func TestADialThatCameBackIsTriedAgain(t *testing.T) {
	cfg := testConfig()
	cfg.ConnectTimeout = 200 * time.Millisecond // of the dial that is not answered
	s, seen, _ := start(t, cfg)
	here := netip.MustParseAddr("127.0.0.1")
	for _, tt := range []struct {
		name string
		suspect
		want error
	}{
		{"none", suspect{}, nil},
		{"it comes back", suspect{here, netip.MustParseAddrPort(loopback(s.Listeners().Outbound))}, upstream.ErrCaptured},
		{"it comes through", suspect{here, echo(t)}, nil},
		{"it is refused", suspect{here, netip.MustParseAddrPort("127.0.0.1:1")}, nil},
		{"it is not answered", suspect{here, blackHole(t)}, nil},
		{"in a client's name", suspect{netip.MustParseAddr("198.51.100.1"), echo(t)}, nil},
	} {
		if got := s.prove(t.Context(), tt.suspect); !errors.Is(got, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
	if len(seen.news) > 0 {
		t.Errorf("recorded as a connection: %+v", seen.next(t))
	}
}

func TestOneConnectionTooManyIsReset(t *testing.T) {
	cfg := testConfig()
	cfg.MaxConnections = 1
	s, seen, _ := start(t, cfg)
	client := carry(t, s.routes()[telemetry.Outbound], echo(t))
	client.Write([]byte("x"))
	client.Read(make([]byte, 1))
	wantResetOf(t, loopback(s.Listeners().Inbound))
	if c := seen.next(t); c.Reason != telemetry.ConnectionLimit || c.Direction != telemetry.Inbound {
		t.Errorf("%+v", c)
	}
	client.Close()
	if c := seen.next(t); c.Reason != telemetry.OK {
		t.Errorf("%+v", c)
	}
	eventually(t, "there is room again", func() bool { return s.live.Count() == 0 })
	wantResetOf(t, loopback(s.Listeners().Inbound))
	if c := seen.next(t); c.Reason != telemetry.OwnListener {
		t.Errorf("%+v", c)
	}
}

func TestDrain(t *testing.T) {
	cfg := testConfig()
	cfg.DrainTimeout = time.Hour
	begin := func(t *testing.T) (s *Server, seen *sink, client *net.TCPConn, stopped chan struct{}) {
		s, seen, stop := start(t, cfg)
		eventually(t, "ready", func() bool { return s.Ready() == nil })
		client = carry(t, s.routes()[telemetry.Outbound], echo(t))
		client.Write([]byte("x"))
		client.Read(make([]byte, 1))
		stopped = make(chan struct{})
		go func() {
			defer close(stopped)
			stop()
		}()
		eventually(t, "draining", func() bool { return errors.Is(s.Ready(), errDraining) })
		eventually(t, "listeners closed", func() bool {
			_, err := net.Dial("tcp", loopback(s.Listeners().Outbound))
			return errors.Is(err, unix.ECONNREFUSED)
		})
		return s, seen, client, stopped
	}
	t.Run("a live connection may end by itself", func(t *testing.T) {
		_, seen, client, stopped := begin(t)
		client.Write([]byte("y"))
		if _, err := client.Read(make([]byte, 1)); err != nil {
			t.Error(err)
		}
		select {
		case <-stopped:
			t.Error("Serve returned with a live connection")
		default:
		}
		client.Close()
		<-stopped
		if c := seen.next(t); c.Reason != telemetry.OK {
			t.Errorf("%+v", c)
		}
	})
	t.Run("Close resets it", func(t *testing.T) {
		s, seen, client, stopped := begin(t)
		s.Close()
		<-stopped
		wantReset(t, client)
		if c := seen.next(t); c.Reason != telemetry.Shutdown {
			t.Errorf("%+v", c)
		}
	})
}

func TestHealthAndAdmin(t *testing.T) {
	s, _, stop := start(t, testConfig())
	eventually(t, "ready", func() bool { return s.Ready() == nil })
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	for _, tt := range []struct {
		l    net.Listener
		path string
		want string
	}{
		{s.health, "/healthz/live", "live"},
		{s.health, "/healthz/ready", "ready"},
		{s.health, "/metrics", "pillion_connections_open"},
		{s.health, "/metrics", "pillion_loop_turns_total"},
		{s.admin, "/connections", `"live": []`},
		{s.admin, "/debug/pprof/goroutine?debug=1", "loop.(*Loop).run"},
	} {
		r, err := client.Get("http://" + tt.l.Addr().String() + tt.path)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(r.Body)
		r.Body.Close()
		if err != nil || r.StatusCode != 200 {
			t.Errorf("%s: %d, %v", tt.path, r.StatusCode, err)
		}
		if !bytes.Contains(body, []byte(tt.want)) {
			t.Errorf("%s: %s; want %q in it", tt.path, body, tt.want)
		}
	}
	stop()
	if _, err := client.Get("http://" + s.health.Addr().String() + "/healthz/live"); err == nil {
		t.Error("answers after Serve has returned")
	}
}

func TestListenFaults(t *testing.T) {
	needRoot(t)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	at := taken.Addr().(*net.TCPAddr).AddrPort()
	for _, tt := range []struct {
		name   string
		change func(*Config)
		want   string
		exit   int
	}{
		{"invalid", func(c *Config) { c.ConnectTimeout = 0 }, "--connect-timeout", config.ExitConfig},
		{"two ports alike", func(c *Config) { c.Listeners.Outbound, c.Listeners.Inbound = 9, 9 }, "must differ", config.ExitConfig},
		{"port in use", func(c *Config) { c.Listeners.Inbound = at.Port() }, at.String(), config.ExitFailure},
		{"health port in use", func(c *Config) { c.Health = at }, "--health", config.ExitFailure},
		{"admin port in use", func(c *Config) { c.Admin = at }, "--admin", config.ExitFailure},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := testConfig()
			tt.change(&cfg)
			s, err := Listen(cfg)
			if err == nil {
				s.Close()
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), tt.want) || config.ExitOf(err) != tt.exit {
				t.Errorf("%v (exit %d); want %q, exit %d", err, config.ExitOf(err), tt.want, tt.exit)
			}
			if tt.exit == config.ExitFailure && config.HintOf(err) == "" {
				t.Errorf("%v: without a hint", err)
			}
		})
	}
}

func TestChosenPortsAreUsable(t *testing.T) {
	needRoot(t)
	s, err := Listen(testConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close() // never served
	cfg := s.cfg
	if err := cfg.Validate(); err != nil {
		t.Errorf("%+v: %v", s.Listeners(), err)
	}
	if !errors.Is(s.Ready(), errNotServing) {
		t.Errorf("ready before Serve: %v", s.Ready())
	}
}
