// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/pillionproxy/pillion/bpf"
	bootstrap "github.com/pillionproxy/pillion/init"
	"github.com/pillionproxy/pillion/redirect"
	"golang.org/x/sys/unix"
)

// forTests heeds what tests ask for by environment variables: PILLION_TEST_WITHOUT takes away cures of the kernel half, by
// their names, and "conntrack" connection tracking; PILLION_TEST_INTERRUPT=fail:N makes an installation fail after its
// change N, kill:N ends the process there.
func (e *env) forTests(o *bootstrap.Options) {
	for _, name := range strings.Split(e.getenv("PILLION_TEST_WITHOUT"), ",") {
		o.Without |= cures[name]
		o.Untracked = o.Untracked || name == "conntrack"
	}
	how, at, ok := strings.Cut(e.getenv("PILLION_TEST_INTERRUPT"), ":")
	if !ok {
		return
	}
	redirect.Interrupt = func(change int) error {
		switch {
		case strconv.Itoa(change) != at:
			return nil
		case how == "kill":
			return unix.Kill(unix.Getpid(), unix.SIGKILL)
		default:
			return fmt.Errorf("interrupted by a test, after change %d", change)
		}
	}
}

// cures are the names of what cures one trap each of the kernel half.
var cures = map[string]bpf.CaptureCure{
	"time-wait":       bpf.CaptureCureCURE_TIME_WAIT,
	"leftover":        bpf.CaptureCureCURE_LEFTOVER,
	"stale-mark":      bpf.CaptureCureCURE_STALE_MARK,
	"release":         bpf.CaptureCureCURE_RELEASE,
	"no-socket":       bpf.CaptureCureCURE_NO_SOCKET,
	"forwarded":       bpf.CaptureCureCURE_FORWARDED,
	"own-address":     bpf.CaptureCureCURE_OWN_ADDRESS,
	"direction":       bpf.CaptureCureCURE_DIRECTION,
	"reflect":         bpf.CaptureCureCURE_REFLECT,
	"link-local":      bpf.CaptureCureCURE_LINK_LOCAL,
	"marked-listener": bpf.CaptureCureCURE_MARKED_LISTENER,
	"guard":           bpf.CaptureCureCURE_GUARD,
	"fragment":        bpf.CaptureCureCURE_FRAGMENT,
	"collision":       bpf.CaptureCureCURE_COLLISION,
}
