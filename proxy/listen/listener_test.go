// SPDX-License-Identifier: Apache-2.0

package listen

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/proxy/loop"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// needRoot skips a test of transparent sockets, or fails it if PILLION_REQUIRE_ROOT is set.
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

// transparent is the kind of a proxy with its capability.
var transparent = Kind{Transparent: true}

func any16(uint16) bool { return true }

func mustOpen(t *testing.T, port uint16) *Listener {
	t.Helper()
	l, err := Open(transparent, port, any16)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

// inbox keeps what a listener accepts.
type inbox struct {
	t     *testing.T
	conns chan *Conn
}

func serve(t *testing.T, l *Listener) *inbox {
	t.Helper()
	g, err := loop.New(loop.Config{})
	if err != nil {
		t.Fatal(err)
	}
	in := &inbox{t: t, conns: make(chan *Conn, 16)}
	if err := l.Serve(g, in); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.Close()
		g.Close()
	})
	return in
}

func (in *inbox) Accepted(c *Conn) { in.conns <- c }

func (in *inbox) Failing(err error) { in.t.Error(err) }

// on runs f on the loop of a connection.
func on(t *testing.T, c *Conn, f func()) {
	t.Helper()
	if !c.Loop().Do(f) {
		t.Fatal("the loop is gone")
	}
}

func dial(t *testing.T, addr netip.Addr, port uint16) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", netip.AddrPortFrom(addr, port).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

var loopbacks = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}

func TestAcceptedConnectionsInheritEverything(t *testing.T) {
	needRoot(t)
	l := mustOpen(t, 0)
	if !l.HasIPv6() {
		t.Skip("no IPv6 here")
	}
	in := serve(t, l)
	for _, addr := range loopbacks {
		t.Run(addr.String(), func(t *testing.T) {
			far := dial(t, addr, l.Port())
			c := <-in.conns
			if want := addrPort(far.RemoteAddr()); c.Local() != want {
				t.Errorf("Local %s, want %s", c.Local(), want)
			}
			if want := addrPort(far.LocalAddr()); c.Remote() != want {
				t.Errorf("Remote %s, want %s", c.Remote(), want)
			}
			on(t, c, func() {
				if c.Mark() != 0 || c.Device() != 0 {
					t.Errorf("mark %#x, device %d; want none", c.Mark(), c.Device())
				}
			})
			for _, o := range []struct {
				name             string
				level, opt, want int
			}{
				{"SO_OOBINLINE", unix.SOL_SOCKET, unix.SO_OOBINLINE, 1},
				{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
				{"TCP_KEEPIDLE", unix.SOL_TCP, unix.TCP_KEEPIDLE, keepaliveIdle},
				{"TCP_KEEPINTVL", unix.SOL_TCP, unix.TCP_KEEPINTVL, keepaliveInterval},
				{"TCP_KEEPCNT", unix.SOL_TCP, unix.TCP_KEEPCNT, keepaliveCount},
				{"TCP_NODELAY", unix.SOL_TCP, unix.TCP_NODELAY, 1},
				{"SO_LINGER", unix.SOL_SOCKET, unix.SO_LINGER, 1}, // its first half: on
			} {
				if got := option(t, c, o.level, o.opt); got != o.want {
					t.Errorf("%s is %d, want %d", o.name, got, o.want)
				}
			}
		})
	}
}

// TestAddressesOfAClientThatIsGone: a connection that was reset before it was accepted has lost its peer's address. A dial from no
// address would be one from whichever the kernel likes.
func TestAddressesOfAClientThatIsGone(t *testing.T) {
	needRoot(t)
	l := mustOpen(t, 0)
	want := map[[2]netip.AddrPort]bool{}
	for _, addr := range loopbacks {
		if addr.Is6() && !l.HasIPv6() {
			continue
		}
		far := dial(t, addr, l.Port())
		want[[2]netip.AddrPort{addrPort(far.LocalAddr()), addrPort(far.RemoteAddr())}] = true
		_ = far.SetLinger(0)
		_ = far.Close()
	}
	in := serve(t, l)
	for range want {
		if c := <-in.conns; !want[[2]netip.AddrPort{c.Remote(), c.Local()}] {
			t.Errorf("from %s to %s, want one of %v", c.Remote(), c.Local(), want)
		}
	}
}

// TestWhoComesBeforeServeInheritsEverythingToo: the kernel makes connections from when a listener is opened.
func TestWhoComesBeforeServeInheritsEverythingToo(t *testing.T) {
	needRoot(t)
	l := mustOpen(t, 0)
	dial(t, loopbacks[0], l.Port())
	c := <-serve(t, l).conns
	if option(t, c, unix.SOL_SOCKET, unix.SO_OOBINLINE) != 1 || option(t, c, unix.SOL_SOCKET, unix.SO_LINGER) != 1 {
		t.Error("it has not inherited what a connection needs")
	}
}

func option(t *testing.T, c *Conn, level, opt int) (v int) {
	t.Helper()
	on(t, c, func() {
		if err := c.Control(func(fd int) (err error) {
			v, err = unix.GetsockoptInt(fd, level, opt)
			return err
		}); err != nil {
			t.Error(err)
		}
	})
	return v
}

func TestLoopbackIsNoDeviceOfAClient(t *testing.T) {
	needRoot(t)
	l := mustOpen(t, 0)
	in := serve(t, l)
	dial(t, loopbacks[0], l.Port())
	c := <-in.conns
	on(t, c, func() {
		var index int
		if err := c.Control(func(fd int) error {
			index = arrivalDevice(fd, false)
			return nil
		}); err != nil {
			t.Error(err)
		}
		if index != 1 || c.Device() != 0 {
			t.Errorf("arrived by device %d (want 1, lo), Device %d (want 0)", index, c.Device())
		}
	})
}

func TestChosenPortIsTheSameInBothFamiliesAndUsable(t *testing.T) {
	needRoot(t)
	asked := 0
	l, err := Open(transparent, 0, func(port uint16) bool {
		asked++
		return asked > 3
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, s := range l.sockets {
		if got := addrPort(s.Addr()).Port(); got != l.Port() {
			t.Errorf("%s, want port %d", s.Addr(), l.Port())
		}
	}
	if _, err := Open(transparent, 0, func(uint16) bool { return false }); config.HintOf(err) == "" {
		t.Errorf("no usable port: %v; want an error with a hint", err)
	}
}

func TestPortInUse(t *testing.T) {
	needRoot(t)
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		t.Run(addr, func(t *testing.T) {
			squatter, err := net.Listen("tcp", addr)
			if err != nil {
				t.Skip(err)
			}
			port := addrPort(squatter.Addr()).Port()
			t.Run("borrowed", func(t *testing.T) {
				opened := make(chan error)
				go func() {
					l, err := Open(transparent, port, any16)
					if err == nil {
						l.Close()
					}
					opened <- err
				}()
				time.Sleep(5 * borrowedStep)
				squatter.Close()
				if err := <-opened; err != nil {
					t.Error(err)
				}
			})
			t.Run("taken", func(t *testing.T) {
				squatter, err := net.Listen("tcp", squatter.Addr().String())
				if err != nil {
					t.Skip(err)
				}
				defer squatter.Close()
				_, err = Open(transparent, port, any16)
				if !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(config.HintOf(err), "ss -ltnp") {
					t.Errorf("%v, hint %q", err, config.HintOf(err))
				}
			})
		})
	}
}
