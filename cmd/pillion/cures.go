// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"

	"github.com/pillionproxy/pillion/bpf"
)

// testWithout is what PILLION_TEST_WITHOUT takes away, so that tests can show that they fail without a cure of the kernel
// half, or see what is done where connections are not tracked.
func (e *env) testWithout() []string { return strings.Split(e.getenv("PILLION_TEST_WITHOUT"), ",") }

// tracking is the name of connection tracking, which packet filters use where it is there.
const tracking = "conntrack"

// cures are the names of those of the kernel half.
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

func without(e *env) (out bpf.CaptureCure) {
	for _, name := range e.testWithout() {
		out |= cures[name]
	}
	return out
}
