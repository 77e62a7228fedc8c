// SPDX-License-Identifier: Apache-2.0

package listen

import (
	"errors"
	"net/netip"
	"runtime"
	"strings"
	"testing"

	"github.com/pillionproxy/pillion/config"
	"golang.org/x/sys/unix"
)

// withoutCapabilities runs f on a thread that has none, and that ends with it.
func withoutCapabilities(t *testing.T, f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&header, &none[0]); err != nil {
			t.Error(err)
			return
		}
		f()
	}()
	<-done
}

func TestKindOf(t *testing.T) {
	needRoot(t)
	kinds := func(want map[config.Listen]Kind) {
		for l, k := range want {
			if got := KindOf(l); got != k {
				t.Errorf("%s: %+v, want %+v", l, got, k)
			}
		}
	}
	kinds(map[config.Listen]Kind{
		config.ListenAuto: {Transparent: true}, config.ListenLoopback: {Transparent: true}, config.ListenAny: {Any: true, Transparent: true},
	})
	withoutCapabilities(t, func() {
		kinds(map[config.Listen]Kind{
			config.ListenAuto: {Any: true}, config.ListenLoopback: {Transparent: true}, config.ListenAny: {Any: true},
		})
		_, err := Open(KindOf(config.ListenLoopback), 0, any16)
		if !errors.Is(err, unix.EPERM) || config.ExitOf(err) != config.ExitNoPerm || !strings.Contains(config.HintOf(err), "CAP_NET_RAW") {
			t.Errorf("on loopback: %v, exit %d, hint %q", err, config.ExitOf(err), config.HintOf(err))
		}
	})
}

// TestAnyAddressWithoutCapability: what connects to the listener as such is seen as that, not as redirected.
func TestAnyAddressWithoutCapability(t *testing.T) {
	needRoot(t)
	var l *Listener
	withoutCapabilities(t, func() {
		var err error
		if l, err = Open(KindOf(config.ListenAuto), 0, any16); err != nil {
			t.Error(err)
		}
	})
	if l == nil {
		t.FailNow()
	}
	in := serve(t, l)
	for _, addr := range []string{"127.0.0.1", "127.0.0.2", "::1"} {
		if addr == "::1" && !l.HasIPv6() {
			continue
		}
		far := dial(t, netip.MustParseAddr(addr), l.Port())
		c := <-in.conns
		defer c.Abort()
		if c.Local() != addrPort(far.RemoteAddr()) || c.Redirected() || !l.At(c.Local()) {
			t.Errorf("Local %s, redirected %v, at the listener %v; want %s, and the listener itself",
				c.Local(), c.Redirected(), l.At(c.Local()), far.RemoteAddr())
		}
		if got := option(t, c, unix.SOL_SOCKET, unix.SO_LINGER); got != 1 {
			t.Errorf("SO_LINGER is %d, want on", got)
		}
	}
}

func TestAt(t *testing.T) {
	loopback, everywhere := &Listener{port: 7}, &Listener{port: 7, kind: Kind{Any: true}}
	for _, tt := range []struct {
		addr            string
		atLoop, atEvery bool
	}{
		{"127.0.0.1:7", true, true},
		{"127.9.9.9:7", true, true},
		{"[::1]:7", true, true},
		{"127.0.0.1:8", false, false},
		{"192.0.2.1:7", false, false}, // another host's port 7
		{"[2001:db8::1]:7", false, false},
	} {
		addr := netip.MustParseAddrPort(tt.addr)
		if got := loopback.At(addr); got != tt.atLoop {
			t.Errorf("%s: at a listener on loopback: %v, want %v", addr, got, tt.atLoop)
		}
		if got := everywhere.At(addr); got != tt.atEvery {
			t.Errorf("%s: at a listener on any address: %v, want %v", addr, got, tt.atEvery)
		}
	}
}
