// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/pillionproxy/pillion/test/testnet"
)

// victim is a connection under way when the proxy is killed. Each function returns how it ended at its side.
type victim struct {
	name           string
	client, server func(*net.TCPConn, *ready) error
}

// ready tells that a side is as the test wants it to be at the moment of the kill; go is closed after the kill.
type ready struct {
	*sync.WaitGroup
	killed <-chan struct{}
}

func (r *ready) wait() {
	r.Done()
	<-r.killed
}

// readOn reads until the stream ends in one way or another.
func readOn(c *net.TCPConn, r *ready) error {
	if _, err := io.CopyN(io.Discard, c, 100_000); err != nil {
		r.Done()
		return err
	}
	r.Done()
	_, err := io.Copy(io.Discard, c)
	return endOf(err)
}

// readLater leaves everything in the kernel until the proxy is dead.
func readLater(c *net.TCPConn, r *ready) error {
	r.wait()
	_, err := io.Copy(io.Discard, c)
	return endOf(err)
}

func endOf(err error) error {
	if err == nil {
		return io.EOF
	}
	return err
}

// writeOn writes until that fails.
func writeOn(c *net.TCPConn, r *ready) error {
	_, err := c.Write(make([]byte, 1<<16))
	r.Done()
	for err == nil {
		_, err = c.Write(make([]byte, 1<<16))
	}
	return err
}

// idle has spoken, and waits.
func idle(c *net.TCPConn, r *ready) error {
	if err := errors.Join(second(io.WriteString(c, "x")), readExactly(c, "x")); err != nil {
		r.Done()
		return err
	}
	r.wait()
	_, err := c.Read(make([]byte, 1))
	return err
}

// afterEnd ends our stream before it goes on with the other.
func afterEnd(then func(*net.TCPConn, *ready) error) func(*net.TCPConn, *ready) error {
	return func(c *net.TCPConn, r *ready) error {
		if err := c.CloseWrite(); err != nil {
			r.Done()
			return err
		}
		return then(c, r)
	}
}

// afterTheirEnd waits for the end of the other's stream before it goes on with ours.
func afterTheirEnd(then func(*net.TCPConn, *ready) error) func(*net.TCPConn, *ready) error {
	return func(c *net.TCPConn, r *ready) error {
		if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			r.Done()
			return fmt.Errorf("%d bytes and %w, want the end", n, err)
		}
		return then(c, r)
	}
}

// TestKilledProxyIsSeenAsAReset is row 20: the kernel closes a killed proxy's sockets as if it had ended the streams
// itself. A reader must not take that for the end of a stream that was cut, nor a server for the end of a request.
func TestKilledProxyIsSeenAsAReset(t *testing.T) {
	t.Parallel()
	p := newCaptured(t, inside)
	killed := make(chan struct{})
	var all sync.WaitGroup
	r := &ready{&sync.WaitGroup{}, killed}
	for _, w := range p.paths() {
		for _, v := range []victim{
			{"idle", idle, idle},
			{"download", readOn, writeOn},
			{"upload", writeOn, readOn},
			{"download to a client that does not read", readLater, writeOn},
			{"upload to a server that does not read", writeOn, readLater},
			{"download after the client's end", afterEnd(readOn), afterTheirEnd(writeOn)},
			{"upload after the server's end", afterTheirEnd(writeOn), afterEnd(readOn)},
		} {
			r.Add(2)
			all.Add(2)
			check := func(side string, err error) {
				defer all.Done()
				// A write may be told before a read: EPIPE is the second answer to ECONNRESET.
				if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
					t.Errorf("%s, %s: the %s got %v, want ECONNRESET", w.name, v.name, side, err)
				}
			}
			to := w.start(func(c *net.TCPConn) { check("server", v.server(c, r)) })
			c, err := w.dial(to)
			if err != nil {
				t.Fatalf("%s: %v", w.name, err)
			}
			t.Cleanup(func() { c.Close() })
			go func() { check("client", v.client(c.TCPConn, r)) }()
		}
	}
	r.Wait()
	p.proxy.Kill()
	close(killed)
	all.Wait()
}

// TestKillsUnderTwoThousandConnects is row 20 once more, with row 2: the proxy's ports are few, so that each new proxy
// takes those which a dead one had used. No connection may end as if it were whole, and none with another's answer.
func TestKillsUnderTwoThousandConnects(t *testing.T) {
	t.Parallel()
	const each, kills = 400, 10
	p := newPod(t)
	ports := []string{"--dial-outbound", "20000-20199", "--dial-inbound", "27000-27199"}
	p.init(ports...)
	p.startProxy(inside, ports...)
	var ok, cut, left atomic.Int64
	var phase atomic.Int64 // odd from before a kill until the next proxy is ready
	var wrong sync.Map
	var all sync.WaitGroup
	for _, w := range p.paths() {
		to := w.start(func(c *net.TCPConn) {
			b := make([]byte, 100)
			n, err := c.Read(b)
			if err == nil {
				_, _ = io.WriteString(c, strings.Repeat(string(b[:n]), 50))
			}
		})
		left.Add(each)
		var next atomic.Int64
		for range 3 {
			all.Go(func() {
				for i := next.Add(1); i <= each; i = next.Add(1) {
					message := fmt.Sprintf("%s number %d", w.name, i)
					before := phase.Load()
					got, err := ask(w, to, message)
					quiet := before%2 == 0 && phase.Load() == before
					switch {
					case err == nil && got == strings.Repeat(message, 50):
						ok.Add(1)
					case !quiet && (errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)):
						cut.Add(1) // a kill cuts what is under way, and nothing else does
					default:
						wrong.Store(message, fmt.Sprintf("%d bytes, %v", len(got), err))
					}
					left.Add(-1)
				}
			})
		}
	}
	n := 0
	for ; n < kills && left.Load() > 0; n++ {
		enough := ok.Load() + each*int64(len(p.paths()))/(kills+4)
		testnet.Wait(t, "the proxy carries connections", func() bool { return ok.Load() >= enough || left.Load() == 0 })
		phase.Add(1)
		p.proxy.Kill()
		p.startProxy(inside, ports...)
		phase.Add(1)
	}
	all.Wait()
	t.Logf("%d kills: %d connections were right, %d were reset", n, ok.Load(), cut.Load())
	wrong.Range(func(message, got any) bool {
		t.Errorf("%s: %s", message, got)
		return true
	})
	if n < kills {
		t.Errorf("%d kills, want %d: this test shows little", n, kills)
	}
}

// ask sends a message and reads all of the answer.
func ask(w path, to netip.AddrPort, message string) (string, error) {
	c, err := w.dial(to)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if _, err := io.WriteString(c, message); err != nil {
		return "", err
	}
	b, err := io.ReadAll(c)
	return string(b), err
}
