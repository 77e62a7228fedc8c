// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"syscall"
	"testing"

	"github.com/pillionproxy/pillion/test/testnet"
)

// TestClosedRefusesEveryone is row 17: under `closed` and without a proxy nobody gets through, at once and with an error
// that says so. Sockets that are bound to a device ignore the unreachable route that refuses the others; without the cure
// they connect directly.
func TestClosedRefusesEveryone(t *testing.T) {
	t.Parallel()
	closed := []string{"--on-proxy-down", "closed", "--on-proxy-down-inbound", "closed"}
	// refused connects over the path: nobody may see the connection, and the client must see the error.
	refused := func(t *testing.T, w path, want syscall.Errno) {
		t.Helper()
		saw := make(chan seen, 1)
		server, to := w.server(echo(saw))
		c, err := w.dial(to)
		if err == nil {
			c.Close()
		}
		if !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
		server.Close() // nobody comes any more
		select {
		case s := <-saw:
			t.Errorf("the server was reached by %s", s.peer)
		default:
		}
	}
	t.Run("with the cure", func(t *testing.T) {
		t.Parallel()
		p := newPod(t)
		p.init(closed...)
		for i, life := range []string{"before the first proxy", "after SIGKILL"} {
			if i > 0 {
				p.startProxy(inside)
				for _, w := range p.paths() {
					p.captured(t, w)
				}
				p.proxy.Kill()
			}
			for _, w := range p.paths() {
				if w.direction == "inbound" {
					t.Run(life+"/"+w.name, func(t *testing.T) { refused(t, w, syscall.ECONNREFUSED) })
					continue
				}
				t.Run(life+"/"+w.name, func(t *testing.T) { refused(t, w, syscall.EHOSTUNREACH) })
				t.Run(life+"/"+w.name+"/non-blocking", func(t *testing.T) {
					refused(t, w.by(p.app, testnet.Dial{NonBlock: true}), syscall.EHOSTUNREACH)
				})
				t.Run(life+"/"+w.name+"/bound to a device", func(t *testing.T) {
					refused(t, w.by(p.app, testnet.Dial{Device: "eth0"}), syscall.ECONNREFUSED)
				})
			}
		}
	})
	t.Run("without the cure", func(t *testing.T) {
		t.Parallel()
		p := newPod(t)
		p.initWithout("guard", closed...)
		for _, w := range p.paths()[:3] {
			t.Run(w.name, func(t *testing.T) {
				refused(t, w, syscall.EHOSTUNREACH) // those that are not bound still are
				bound := w.by(p.app, testnet.Dial{Device: "eth0"})
				if w.to.Is6() {
					refused(t, bound, syscall.EHOSTUNREACH) // IPv6 heeds the rule behind the route, which is another cure
					return
				}
				p.direct(t, bound) // past the sidecar that is not there
			})
		}
	})
}
