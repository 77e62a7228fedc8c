// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"testing"

	"golang.org/x/sys/unix"
)

// LeaseAll leaves no pipe to anybody else until give is called.
func LeaseAll() (give func()) {
	var all []*pipe
	for p := pipes.take(); p != nil; p = pipes.take() {
		all = append(all, p)
	}
	return func() {
		for _, p := range all {
			pipes.give(p, true)
		}
	}
}

func isOpen(p *pipe) bool {
	_, err := unix.FcntlInt(uintptr(p.in), unix.F_GETFD, 0)
	_, err2 := unix.FcntlInt(uintptr(p.out), unix.F_GETFD, 0)
	return err == nil && err2 == nil
}

// TestPipes: there are so many, the last that was given back is lent first, one that is not empty never again, and none stays open.
func TestPipes(t *testing.T) {
	var l pipeList
	var leased []*pipe
	for range maxPipes {
		p := l.take()
		if p == nil {
			t.Fatalf("only %d pipes can be had", len(leased))
		}
		leased = append(leased, p)
	}
	if p := l.take(); p != nil {
		t.Errorf("a pipe more than %d", maxPipes)
	}
	if size, err := unix.FcntlInt(uintptr(leased[0].in), unix.F_GETPIPE_SZ, 0); size < pipeSize || err != nil {
		t.Errorf("a pipe of %d bytes, %v; want %d", size, err, pipeSize)
	}
	l.give(leased[0], false)
	if isOpen(leased[0]) {
		t.Error("a pipe that was not empty is open")
	}
	l.give(leased[1], true)
	if p := l.take(); p != leased[1] {
		t.Error("another pipe than the one that was given back last")
	}
	for _, p := range leased[1:] {
		l.give(p, true)
	}
	l.closeFree()
	for i, p := range leased {
		if isOpen(p) {
			t.Errorf("pipe %d is open", i)
		}
	}
	if l.leased != 0 {
		t.Errorf("%d pipes are leased", l.leased)
	}
	l.trim.Stop()
}
