// SPDX-License-Identifier: Apache-2.0

package listen

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestSignalAtTheUrgentByte: a read at the urgent byte says that there is nothing while a signal is pending. Who then waits
// for input waits for ever: the input has come.
func TestSignalAtTheUrgentByte(t *testing.T) {
	needRoot(t)
	l := mustOpen(t, 0)
	in := serve(t, l)
	far := dial(t, loopbacks[0], l.Port())
	c := <-in.conns
	raw, err := far.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}

	rounds := 2000
	if testing.Short() {
		rounds = 200
	}
	thread, received := make(chan int), make(chan bool)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		thread <- unix.Gettid()
		for range rounds {
			_, _, err := c.Recv()
			if err != nil {
				t.Error(err)
				break
			}
			c.Release()
			received <- true
		}
		close(received)
	}()
	tid := <-thread
	var stop atomic.Bool
	var signals sync.WaitGroup
	signals.Go(func() {
		for !stop.Load() {
			_ = unix.Tgkill(unix.Getpid(), tid, unix.SIGURG) // as the scheduler does; the thread may be gone at the end
		}
	})
	defer signals.Wait()
	defer stop.Store(true)
	for round := range rounds {
		var serr error
		if err := raw.Write(func(fd uintptr) bool {
			_, serr = unix.SendmsgN(int(fd), []byte{'!'}, nil, nil, unix.MSG_OOB)
			return true
		}); err != nil || serr != nil {
			t.Fatal(err, serr)
		}
		select {
		case <-received:
		case <-time.After(30 * time.Second):
			c.Abort()
			<-received
			t.Fatalf("round %d: the urgent byte is there and nobody reads it", round)
		}
	}
	c.Abort()
}
