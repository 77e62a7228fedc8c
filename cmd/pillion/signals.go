// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// caught are the signals that were sent to us and are a command's.
type caught struct {
	signals chan os.Signal
	done    chan struct{}
	passing sync.WaitGroup
}

// catchSignals catches them from now on. What whoever started us wants ignored, as nohup does SIGHUP, is for the command to ignore,
// too: Go leaves SIGHUP and SIGINT so, and no other (os/signal).
func catchSignals() *caught {
	c := &caught{signals: make(chan os.Signal, 16), done: make(chan struct{})}
	all := []os.Signal{syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGALRM}
	signal.Notify(c.signals, slices.DeleteFunc(all, signal.Ignored)...)
	return c
}

// passTo passes them on to a process, also those that came before. What the terminal sends goes to its whole foreground process
// group: the command has got it already, and decides.
func (c *caught) passTo(p *os.Process) {
	c.passing.Go(func() {
		for {
			select {
			case s := <-c.signals:
				if (s == syscall.SIGINT || s == syscall.SIGQUIT) && inForeground() {
					continue
				}
				p.Signal(s) // an error means that it has ended, which Wait tells
			case <-c.done:
				return
			}
		}
	})
}

// stop ends the catching, and waits until nothing more is passed on.
func (c *caught) stop() {
	signal.Stop(c.signals)
	close(c.done)
	c.passing.Wait()
}

// inForeground reports whether we are in the foreground process group of our terminal.
func inForeground() bool {
	tty, err := os.Open("/dev/tty")
	if err != nil {
		return false
	}
	defer tty.Close()
	group, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}
