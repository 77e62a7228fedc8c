// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"net/netip"
	"testing"

	"github.com/pillionproxy/pillion/test/testnet"
)

// appMark is a mark that apps set for their own ends, and the host routes by.
const appMark = 5

// TestAppsOwnMarkDecidesTheRoute is row 11: an app sets SO_MARK, and a rule of the host sends that very mark by another
// NIC. The proxy's dial must carry the app's mark and nothing beside it, and keep the app's source address. How it would
// be without us, an agent outside of the cgroup tells.
//
// There is no switch: the test was seen to fail (by v0 in place of v1, in each row with the mark) with RoleProxy added to
// the mark of upstream.Dialer.Outbound.
func TestAppsOwnMarkDecidesTheRoute(t *testing.T) {
	t.Parallel()
	for _, where := range placements {
		t.Run(string(where), func(t *testing.T) {
			if where == inside {
				testnet.Need(t, testnet.RawMark)
			}
			p := newPod(t)
			p.addNIC()
			p.markRoute(appMark, 500)
			p.init()
			p.startProxy(where)
			neighbour := p.ns.Agent(p.net.Cgroup("neighbour"))
			for _, w := range p.outs() {
				for _, tt := range []struct {
					name, from, nic string
					dial            testnet.Dial
				}{
					{"the mark", pick(w, other4, other6), "v1", testnet.Dial{Mark: appMark}},
					{"the mark and a second address", pick(w, second4, second6), "v1", testnet.Dial{Mark: appMark, From: port0(w, second4, second6)}},
					{"the mark and a device", pick(w, other4, other6), "v1", testnet.Dial{Mark: appMark, Device: "eth1"}},
					{"another mark", pick(w, pod4, pod6), "v0", testnet.Dial{Mark: appMark + 1}},
					{"the highest bit", pick(w, pod4, pod6), "v0", testnet.Dial{Mark: -1 << 31}},
				} {
					t.Run(w.name+"/"+tt.name, func(t *testing.T) {
						w, nic := p.onNIC(w)
						w.from = netip.MustParseAddr(tt.from)
						p.direct(t, w.by(neighbour, tt.dial))
						if got := <-nic; got != tt.nic {
							t.Fatalf("without us it comes by %s, want %s: this test is wrong", got, tt.nic)
						}
						p.captured(t, w.by(p.app, tt.dial))
						if got := <-nic; got != tt.nic {
							t.Errorf("the proxy's dial left by %s, want %s", got, tt.nic)
						}
					})
				}
			}
		})
	}
}

// TestListenerWithAMarkOfItsOwn is row 14: what such a listener accepts answers with its mark, which is not ours, so that
// a dial in the client's name would get no answer. It is dialled from the pod's own address instead.
func TestListenerWithAMarkOfItsOwn(t *testing.T) {
	t.Parallel()
	for _, where := range placements {
		t.Run(string(where), func(t *testing.T) {
			p := newCaptured(t, where)
			for _, w := range p.ins() {
				saw := make(chan seen, 1)
				w.serve = p.listeningAs(testnet.Listening{Mark: appMark})
				to := w.start(echo(saw))
				c, err := w.dial(to)
				if err == nil {
					defer c.Close()
					err = exchange(c, "through the sidecar")
				}
				if err == nil {
					err = finish(c.TCPConn)
				}
				if err != nil {
					t.Fatalf("%s: %v", w.name, err)
				}
				r, server := p.proxy.waitRecord(t, c.Own), <-saw
				if r.Destination != to || r.Upstream != server.peer || server.peer.Addr() != w.to || r.Direction != "inbound" || r.Reason != "ok" {
					t.Errorf("%s: record %+v, the app's peer is %s; want the pod's own address %s", w.name, r, server.peer, w.to)
				}
			}
		})
	}
	t.Run("without the cure", func(t *testing.T) {
		p := newUncured(t, "marked-listener", nil)
		for _, w := range p.ins() {
			w.serve = p.listeningAs(testnet.Listening{Mark: appMark})
			to := w.start(echo(make(chan seen, 1)))
			c, err := w.dial(to)
			if err != nil {
				t.Errorf("%s: %v, want that the proxy takes the connection", w.name, err)
				continue
			}
			defer c.Close()
			if r := p.proxy.waitRecord(t, c.Own); r.Reason != "upstream_connect_timeout" {
				t.Errorf("%s: record %+v, want that the dial gets no answer", w.name, r)
			}
		}
	})
}
