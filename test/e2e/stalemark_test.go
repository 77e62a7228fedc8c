// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"net/netip"
	"syscall"
	"testing"
	"unsafe"

	"github.com/pillionproxy/pillion/test/testnet"
	"golang.org/x/sys/unix"
)

// tryOp connects a socket of the agent's and keeps it, whatever comes of it; the result is the errno.
var tryOp = testnet.NewOp("try", func(a tryArgs) (syscall.Errno, error) {
	err := error(nil)
	if a.To == (netip.AddrPort{}) { // connect(2): AF_UNSPEC takes a connection back
		unspec := unix.RawSockaddr{Family: unix.AF_UNSPEC}
		if _, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(a.Socket), uintptr(unsafe.Pointer(&unspec)), unix.SizeofSockaddrInet4); errno != 0 {
			err = errno
		}
	} else {
		err = unix.Connect(a.Socket, sockaddrOf(a.To, a.Mapped))
	}
	var errno syscall.Errno
	if err != nil && !errors.As(err, &errno) {
		return 0, err
	}
	return errno, nil
})

type tryArgs struct {
	Socket int
	To     netip.AddrPort // zero: take the connection back
	Mapped bool
}

func (p *pod) try(t *testing.T, a tryArgs) syscall.Errno {
	t.Helper()
	errno, err := tryOp.Call(p.app, a)
	if err != nil {
		t.Fatal(err)
	}
	return errno
}

// TestSocketThatFailedConnectsAgain: the mark of a connect that was refused by policy must not decide the route and the
// source of the next one on the same socket. Rows 4 and 5.
func TestSocketThatFailedConnectsAgain(t *testing.T) {
	t.Parallel()
	again := func(t *testing.T, without string, wantErrno syscall.Errno) {
		p := newPod(t)
		p.initForm(challenge, without, "--on-proxy-down", "closed")
		var sockets []int
		ways := p.paths()[:3]
		saws := make([]chan seen, len(ways))
		tos := make([]netip.AddrPort, len(ways))
		for i, w := range ways {
			saws[i] = make(chan seen, 1)
			tos[i] = w.start(echo(saws[i]))
			fd := p.socketFor(t, w)
			if errno := p.try(t, tryArgs{fd, tos[i], w.name == "out/mapped"}); errno != syscall.EHOSTUNREACH {
				t.Fatalf("%s: without a proxy: %v, want EHOSTUNREACH", w.name, errno)
			}
			sockets = append(sockets, fd)
		}
		p.startProxy(inside)
		for i, w := range ways {
			c, err := p.app.Dial(testnet.Dial{To: tos[i].String(), Mapped: w.name == "out/mapped", Socket: sockets[i]})
			if wantErrno != 0 {
				if !errors.Is(err, wantErrno) {
					t.Errorf("%s: with the cure taken out: %v, want %v", w.name, err, wantErrno)
				}
				continue
			}
			if err != nil {
				t.Errorf("%s: once the proxy is up: %v", w.name, err)
				continue
			}
			p.wentThrough(t, w, c, tos[i], saws[i])
		}
	}
	again(t, "", 0)
	t.Run("without the cure", func(t *testing.T) { again(t, "stale-mark", syscall.EHOSTUNREACH) })
}

func (p *pod) socketFor(t *testing.T, w path) int {
	t.Helper()
	family := unix.AF_INET
	if w.name != "out/v4" {
		family = unix.AF_INET6
	}
	fd, err := p.app.Socket(family)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// TestSocketTakenBackConnectsAgain: a connection taken back by connect(AF_UNSPEC) leaves its mark on the socket; the next
// connect must have a source address of its own all the same. Rows 4 and 5.
func TestSocketTakenBackConnectsAgain(t *testing.T) {
	t.Parallel()
	p := newCaptured(t, inside)
	for _, w := range p.paths()[:3] {
		t.Run(w.name, func(t *testing.T) {
			mapped, fd := w.name == "out/mapped", p.socketFor(t, w)
			first := make(chan seen, 1)
			if errno := p.try(t, tryArgs{fd, w.start(echo(first)), mapped}); errno != 0 {
				t.Fatalf("first connect: %v", errno)
			}
			if errno := p.try(t, tryArgs{Socket: fd}); errno != 0 {
				t.Fatalf("connect(AF_UNSPEC): %v", errno)
			}
			saw := make(chan seen, 1)
			to := w.start(echo(saw))
			c, err := p.app.Dial(testnet.Dial{To: to.String(), Mapped: mapped, Socket: fd})
			if err != nil {
				t.Fatal(err)
			}
			p.wentThrough(t, w, c, to, saw)
		})
	}
	t.Run("without the cure", func(t *testing.T) {
		p := newPod(t)
		p.initForm(challenge, "stale-mark")
		p.startProxy(inside)
		w := p.paths()[0]
		fd := p.socketFor(t, w)
		to := w.start(echo(make(chan seen, 1)))
		first, unspec := p.try(t, tryArgs{fd, to, false}), p.try(t, tryArgs{Socket: fd})
		if first != 0 || unspec != 0 {
			t.Fatalf("connect: %v, connect(AF_UNSPEC): %v", first, unspec)
		}
		if errno := p.try(t, tryArgs{fd, to, false}); errno == 0 {
			t.Error("the second connect succeeded: this test shows nothing")
		} else {
			t.Logf("second connect: %v", errno)
		}
	})
}
