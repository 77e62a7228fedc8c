// SPDX-License-Identifier: Apache-2.0

package listen

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/config"
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
	conns   chan *Conn
	failing chan error
	room    chan struct{}
}

func serve(t *testing.T, l *Listener) *inbox {
	in := &inbox{conns: make(chan *Conn, 16), failing: make(chan error, 16), room: make(chan struct{}, 1)}
	var serving sync.WaitGroup
	serving.Go(func() { l.Serve(in) })
	t.Cleanup(func() {
		l.Close()
		serving.Wait()
	})
	return in
}

func (in *inbox) Accepted(c *Conn) { in.conns <- c }

func (in *inbox) Failing(err error) {
	select {
	case in.failing <- err:
	default:
	}
}

func (in *inbox) Room() <-chan struct{} { return in.room }

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
			defer c.Abort()
			if want := addrPort(far.RemoteAddr()); c.Local() != want {
				t.Errorf("Local %s, want %s", c.Local(), want)
			}
			if want := addrPort(far.LocalAddr()); c.Remote() != want {
				t.Errorf("Remote %s, want %s", c.Remote(), want)
			}
			if c.Mark() != 0 || c.Device() != 0 {
				t.Errorf("mark %#x, device %d; want none", c.Mark(), c.Device())
			}
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

func option(t *testing.T, c *Conn, level, opt int) (v int) {
	t.Helper()
	var gerr error
	if err := errors.Join(c.raw.Control(func(fd uintptr) { v, gerr = unix.GetsockoptInt(int(fd), level, opt) }), gerr); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestLoopbackIsNoDeviceOfAClient(t *testing.T) {
	needRoot(t)
	l := mustOpen(t, 0)
	in := serve(t, l)
	dial(t, loopbacks[0], l.Port())
	c := <-in.conns
	defer c.Abort()
	var index int
	if err := c.raw.Control(func(fd uintptr) { index = arrivalDevice(int(fd), false) }); err != nil {
		t.Fatal(err)
	}
	if index != 1 || c.Device() != 0 {
		t.Errorf("arrived by device %d (want 1, lo), Device %d (want 0)", index, c.Device())
	}
}

func TestCloseIsCleanAndAbortIsReset(t *testing.T) {
	needRoot(t)
	l := mustOpen(t, 0)
	in := serve(t, l)
	far := dial(t, loopbacks[0], l.Port())
	c := <-in.conns
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if n, err := far.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("after Close: %d, %v; want io.EOF", n, err)
	}
	far = dial(t, loopbacks[0], l.Port())
	c = <-in.conns
	c.Abort()
	if n, err := far.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("after Abort: %d, %v; want ECONNRESET", n, err)
	}
	c.Abort() // again is harmless
	if _, _, err := c.Recv(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Recv after Abort: %v; want net.ErrClosed", err)
	}
}

func TestWatch(t *testing.T) {
	needRoot(t)
	l := mustOpen(t, 0)
	in := serve(t, l)

	t.Run("a stream's end and data are not a departure", func(t *testing.T) {
		far := dial(t, loopbacks[0], l.Port())
		c := <-in.conns
		defer c.Abort()
		stop := c.Watch(func(err error) { t.Errorf("gone: %v", err) })
		far.Write([]byte("x"))
		far.CloseWrite()
		stop()
		if data, _, err := c.Recv(); err != nil || string(data) != "x" {
			t.Errorf("Recv: %q, %v", data, err)
		}
		c.Release()
		if _, _, err := c.Recv(); err != io.EOF {
			t.Errorf("Recv: %v, want io.EOF", err)
		}
	})
	t.Run("a reset is", func(t *testing.T) {
		far := dial(t, loopbacks[0], l.Port())
		c := <-in.conns
		gone := make(chan error, 1)
		stop := c.Watch(func(err error) { gone <- err })
		far.SetLinger(0)
		far.Close()
		if err := <-gone; !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("gone: %v, want ECONNRESET", err)
		}
		stop()
		c.Abort()
	})
	t.Run("closed under it", func(t *testing.T) {
		dial(t, loopbacks[0], l.Port())
		c := <-in.conns
		stop := c.Watch(func(err error) { t.Errorf("gone: %v", err) })
		c.Abort()
		stop()
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

func TestWithoutDescriptorsAcceptWaitsForRoom(t *testing.T) {
	needRoot(t)
	l := mustOpen(t, 0)
	in := serve(t, l)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0) // the client's, made while there are descriptors
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)

	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	next, err := unix.Dup(fd) // the lowest free descriptor: no descriptor may be as high from now on
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(next)
	if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(next), Max: old.Max}, nil); err != nil {
		t.Fatal(err)
	}
	restore := sync.OnceFunc(func() { unix.Prlimit(0, unix.RLIMIT_NOFILE, &old, nil) })
	defer restore()

	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(l.Port()), Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := <-in.failing; !errors.Is(err, unix.EMFILE) {
		t.Errorf("failing with %v, want EMFILE", err)
	}
	restore()
	in.room <- struct{}{}
	c := <-in.conns
	c.Abort()
}
