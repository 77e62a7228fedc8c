// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/pillionproxy/pillion/test/testnet"
)

// TestSYNCookies is row 18: a handshake by cookie keeps no socket between SYN and ACK, so the last ACK finds none. It must
// come to the proxy's listener; so must that of the proxy's dial to the app's own listener. Without the cure the client
// believes that it is connected, and either hangs or is reset.
func TestSYNCookies(t *testing.T) {
	t.Parallel()
	always := func(p *pod) { p.ns.Sysctl("net.ipv4.tcp_syncookies", "2") }
	t.Run("with the cure", func(t *testing.T) {
		t.Parallel()
		p := newPod(t)
		always(p)
		p.init() // whose own connections are made by cookies too
		p.startProxy(inside)
		for _, w := range p.paths() {
			t.Run(w.name, func(t *testing.T) {
				before := cookies(t, p.ns)
				for range 3 {
					p.captured(t, w)
				}
				// One handshake of the client with the proxy; inbound, one of the proxy with the app too.
				want := 3
				if w.direction == "inbound" {
					want = 6
				}
				if got := cookies(t, p.ns) - before; got < want {
					t.Errorf("%d handshakes by cookie, want at least %d: this test shows nothing", got, want)
				}
			})
		}
	})
	t.Run("without the cure", func(t *testing.T) {
		t.Parallel()
		p := newPod(t)
		always(p)
		p.initWithout("no-socket", "--no-verify")
		p.startProxy(inside)
		for _, w := range p.paths() {
			t.Run(w.name, func(t *testing.T) {
				saw := make(chan seen, 1)
				c, err := w.dial(w.start(echo(saw)))
				if err != nil {
					t.Logf("connect: %v", err)
					return
				}
				defer c.Close()
				if _, err := c.Write([]byte("hello")); err != nil {
					t.Logf("write: %v", err)
					return
				}
				answered := make(chan error, 1)
				go func() { answered <- readExactly(c, "hello") }()
				w.clientNS.WaitSocket(t, "the client is reset, or sends in vain", func(s testnet.Socket) bool {
					select {
					case err = <-answered:
						return true
					default:
						return s.Local == c.Own && s.State == testnet.Established && s.Retransmits > 1
					}
				})
				switch {
				case err == nil:
					select {
					case <-saw:
						t.Errorf("the server was reached: there is no hazard")
					default:
						t.Logf("the client hangs")
					}
				case errors.Is(err, syscall.ECONNRESET):
					t.Logf("the client is reset")
				default:
					t.Errorf("%v, want it reset", err)
				}
			})
		}
	})
}

// cookies counts the handshakes that were finished by a cookie in the namespace so far.
func cookies(t *testing.T, ns *testnet.Namespace) int {
	t.Helper()
	var b []byte
	var err error
	ns.Do(func() { b, err = os.ReadFile("/proc/thread-self/net/netstat") })
	if err != nil {
		t.Fatal(err)
	}
	// A line of names, and below it a line of values.
	lines := strings.Split(string(b), "\n")
	for i := 0; i+1 < len(lines); i += 2 {
		values := strings.Fields(lines[i+1])
		for j, name := range strings.Fields(lines[i]) {
			if name == "SyncookiesRecv" {
				n, err := strconv.Atoi(values[j])
				if err != nil {
					t.Fatal(err)
				}
				return n
			}
		}
	}
	t.Fatal("the kernel does not count SYN cookies")
	return 0
}
