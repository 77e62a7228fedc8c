// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/pillionproxy/pillion/test/testnet"
)

// payload is reproducible noise: a byte too many, too few or in the wrong place changes its sum.
func payload(seed uint64, size int) []byte {
	var key [32]byte
	key[0] = byte(seed)
	b := make([]byte, size)
	_, _ = rand.NewChaCha8(key).Read(b)
	return b
}

// sumOf reads to the end.
func sumOf(r io.Reader) (string, error) {
	h := sha256.New()
	n, err := io.Copy(h, r)
	return fmt.Sprintf("%d bytes, sha256 %x", n, h.Sum(nil)[:8]), err
}

func wantSum(b []byte) string {
	s, _ := sumOf(bytes.NewReader(b))
	return s
}

const streamSize = 6 << 20

// TestHalfClose: either side may end its stream first; the other direction goes on, and not a byte is lost.
func TestHalfClose(t *testing.T) {
	t.Parallel()
	up, down := payload(1, streamSize), payload(2, streamSize)
	// upThenDown sends, ends its stream, and then reads; downThenUp is the other side of it.
	sendFirst := func(c *net.TCPConn, send []byte) (string, error) {
		if _, err := c.Write(send); err != nil {
			return "", err
		}
		if err := c.CloseWrite(); err != nil {
			return "", err
		}
		return sumOf(c)
	}
	readFirst := func(c *net.TCPConn, send []byte) (string, error) {
		sum, err := sumOf(c)
		if err != nil {
			return sum, err
		}
		_, err = c.Write(send)
		return sum, err
	}
	both := func(c *net.TCPConn, send []byte) (string, error) {
		wrote := make(chan error, 1)
		go func() {
			_, err := c.Write(send)
			wrote <- errors.Join(err, c.CloseWrite())
		}()
		sum, err := sumOf(c)
		return sum, errors.Join(err, <-wrote)
	}
	for _, where := range placements {
		t.Run(string(where), func(t *testing.T) {
			p := newCaptured(t, where)
			for _, w := range p.paths() {
				for _, tt := range []struct {
					name           string
					client, server func(*net.TCPConn, []byte) (string, error)
				}{{"client ends first", sendFirst, readFirst}, {"server ends first", readFirst, sendFirst}, {"both at once", both, both}} {
					t.Run(w.name+"/"+tt.name, func(t *testing.T) {
						served := make(chan error, 1)
						to := w.start(func(c *net.TCPConn) {
							got, err := tt.server(c, down)
							if err == nil && got != wantSum(up) {
								err = fmt.Errorf("read %s, want %s", got, wantSum(up))
							}
							served <- err
						})
						c, err := w.dial(to)
						if err != nil {
							t.Fatal(err)
						}
						defer c.Close()
						got, err := tt.client(c.TCPConn, up)
						if err == nil && got != wantSum(down) {
							err = fmt.Errorf("read %s, want %s", got, wantSum(down))
						}
						c.Close()
						if serr := <-served; err != nil || serr != nil {
							t.Fatalf("client: %v; server: %v", err, serr)
						}
						if r := p.proxy.waitRecordOf(t, c); r.Reason != "ok" || r.Sent != streamSize || r.Received != streamSize {
							t.Errorf("record %+v, want ok and %d bytes each way", r, streamSize)
						}
					})
				}
			}
		})
	}
}

// TestServerSpeaksFirst: SSH, SMTP and MySQL clients wait for a greeting.
func TestServerSpeaksFirst(t *testing.T) {
	t.Parallel()
	p := newCaptured(t, inside)
	for _, w := range p.paths() {
		t.Run(w.name, func(t *testing.T) {
			to := w.start(func(c *net.TCPConn) {
				_, _ = io.WriteString(c, "220 ready\r\n")
				_, _ = io.Copy(c, c)
			})
			c, err := w.dial(to)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if err := errors.Join(readExactly(c, "220 ready\r\n"), exchange(c, "HELO"), finish(c.TCPConn)); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestResetIsPassedOn: a reset by either side is a reset at the other, not the end of the stream.
func TestResetIsPassedOn(t *testing.T) {
	t.Parallel()
	reset := func(c *net.TCPConn) {
		_ = c.SetLinger(0)
		c.Close()
	}
	for _, where := range placements {
		t.Run(string(where), func(t *testing.T) {
			p := newCaptured(t, where)
			for _, w := range p.paths() {
				t.Run(w.name+"/by the server", func(t *testing.T) {
					to := w.start(func(c *net.TCPConn) {
						_ = readExactly(c, "x")
						reset(c)
					})
					c, err := w.dial(to)
					if err != nil {
						t.Fatal(err)
					}
					defer c.Close()
					_, err = c.Write([]byte("x"))
					_, rerr := c.Read(make([]byte, 1))
					if err != nil || !errors.Is(rerr, syscall.ECONNRESET) {
						t.Errorf("write: %v, read: %v, want ECONNRESET", err, rerr)
					}
					if r := p.proxy.waitRecordOf(t, c); r.Reason != "upstream_reset" {
						t.Errorf("record %+v, want reason upstream_reset", r)
					}
				})
				t.Run(w.name+"/by the client", func(t *testing.T) {
					got := make(chan error, 1)
					to := w.start(func(c *net.TCPConn) {
						if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
							got <- err
							return
						}
						_, _ = c.Write([]byte("y"))
						_, err := c.Read(make([]byte, 1))
						got <- err
					})
					c, err := w.dial(to)
					if err != nil {
						t.Fatal(err)
					}
					if err := errors.Join(second(c.Write([]byte("x"))), readExactly(c, "y")); err != nil {
						t.Fatal(err)
					}
					reset(c.TCPConn)
					if err := <-got; !errors.Is(err, syscall.ECONNRESET) {
						t.Errorf("the server read %v, want ECONNRESET", err)
					}
					if r := p.proxy.waitRecordOf(t, c); r.Reason != "client_reset" {
						t.Errorf("record %+v, want reason client_reset", r)
					}
				})
			}
		})
	}
}

func second[T any](_ T, err error) error { return err }

// TestBackPressure: a client that does not read stops its server; once it reads, nothing was lost.
func TestBackPressure(t *testing.T) {
	t.Parallel()
	// bound is far above what the kernel's own buffers hold (a few MiB), and far below all.
	const all, bound = 96 << 20, 48 << 20
	p := newCaptured(t, inside)
	block := payload(3, 1<<20)
	for _, w := range p.paths() {
		t.Run(w.name, func(t *testing.T) {
			var wrote atomic.Int64
			finished := make(chan error, 1)
			accepted := make(chan netip.AddrPort, 1)
			to := w.start(func(c *net.TCPConn) {
				accepted <- unmap(addrPort(c.RemoteAddr()))
				for wrote.Load() < all {
					n, err := c.Write(block)
					wrote.Add(int64(n))
					if err != nil {
						finished <- err
						return
					}
				}
				finished <- nil
			})
			c, err := w.dial(to)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			peer := <-accepted
			serverNS := p.ext
			if w.direction == "inbound" {
				serverNS = p.ns
			}
			serverNS.WaitSocket(t, "the server's connection meets a closed window", func(s testnet.Socket) bool {
				return unmap(s.Local) == to && unmap(s.Remote) == peer && s.Timer == testnet.TimerProbe && s.Unsent > 0 || wrote.Load() == all
			})
			stoppedAt := wrote.Load()
			t.Logf("the server was stopped after %.1f MiB", float64(stoppedAt)/(1<<20))
			if stoppedAt > bound {
				t.Errorf("the server was stopped only after %d bytes, want at most %d", stoppedAt, bound)
			}
			got, err := sumOf(c)
			if err := errors.Join(err, <-finished); err != nil {
				t.Fatal(err)
			}
			if want := wantSum(bytes.Repeat(block, all>>20)); got != want {
				t.Errorf("the client read %s, want %s", got, want)
			}
		})
	}
}

// TestClosedPort: the app of an outbound connection is told at once, by a reset; the client of an inbound one is refused
// by the app's kernel as ever.
func TestClosedPort(t *testing.T) {
	t.Parallel()
	p := newCaptured(t, inside)
	for _, w := range p.paths() {
		t.Run(w.name, func(t *testing.T) {
			s := w.serve(w.serveNet, net.JoinHostPort(w.serveHost, "0"), func(*net.TCPConn) {})
			s.Close() // a port that was just given is one that nobody else has
			c, err := w.dial(netip.AddrPortFrom(w.to, s.Addr.Port()))
			if w.direction == "inbound" {
				if !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("connect: %v, want ECONNREFUSED", err)
				}
				return
			}
			if err == nil {
				defer c.Close()
				_, err = c.Read(make([]byte, 1))
				if r := p.proxy.waitRecordOf(t, c); r.Reason != "upstream_connect_refused" || r.Error == "" {
					t.Errorf("record %+v, want reason upstream_connect_refused and an error", r)
				}
			}
			if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%v, want ECONNRESET", err)
			}
		})
	}
}

// TestBlackHole: what never answers ends by the connect timeout, as a reset with its reason.
func TestBlackHole(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.ext.Blackhole(nobody4+"/32", nobody6+"/128")
	p.init()
	p.startProxy(inside, "--connect-timeout", "300ms")
	for _, d := range []testnet.Dial{{To: nobody4 + ":80"}, {To: "[" + nobody6 + "]:80"}, {To: nobody4 + ":80", Mapped: true}} {
		t.Run(fmt.Sprintf("%s mapped %v", d.To, d.Mapped), func(t *testing.T) {
			c, err := p.app.Dial(d)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("read: %v, want ECONNRESET", err)
			}
			if r := p.proxy.waitRecordOf(t, c); r.Reason != "upstream_connect_timeout" {
				t.Errorf("record %+v, want reason upstream_connect_timeout", r)
			}
		})
	}
}
