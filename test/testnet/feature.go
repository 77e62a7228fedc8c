// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"errors"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Feature is something that not every kernel has. It is tried, never concluded from a version.
type Feature struct {
	what string
	try  func() error
}

// What tests ask for.
var (
	MPTCP   = Feature{"MPTCP sockets", sync.OnceValue(tryMPTCP)}
	TCX     = Feature{"tc filters that end with their process (tcx)", sync.OnceValue(tryTCX)}
	RawMark = Feature{"packet marks set with CAP_NET_RAW alone", sync.OnceValue(tryRawMark)}
)

// Have reports whether this kernel has the feature.
func (f Feature) Have() bool { return f.try() == nil }

// Need skips the test where the kernel does not have the feature, and says which.
func Need(t testing.TB, f Feature) {
	t.Helper()
	if err := f.try(); err != nil {
		t.Skipf("this kernel does not have %s: %v", f.what, err)
	}
}

func tryMPTCP() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_MPTCP)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// tryTCX attaches a filter that passes everything to lo of a namespace of its own.
func tryTCX() (err error) {
	onThread(func() {
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return
		}
		const lo = 1
		var p *ebpf.Program
		p, err = ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}})
		if err != nil {
			return
		}
		defer p.Close()
		var l link.Link
		if l, err = link.AttachTCX(link.TCXOptions{Interface: lo, Program: p, Attach: ebpf.AttachTCXIngress}); err == nil {
			err = l.Close()
		}
	})
	return err
}

// tryRawMark marks a socket on a thread that has no other capability.
func tryRawMark() (err error) {
	onThread(func() {
		var fd int
		if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return
		}
		var none [2]unix.CapUserData
		none[0].Effective = 1 << unix.CAP_NET_RAW
		none[0].Permitted = none[0].Effective
		if err = unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0]); err == nil {
			err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, 1)
		}
		err = errors.Join(err, unix.Close(fd))
	})
	return err
}
