// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"

	"github.com/pillionproxy/pillion/bpf"
)

// cures are the names by which PILLION_TEST_WITHOUT takes cures out of the kernel half, so that tests can show that they
// fail without them.
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
	for _, name := range strings.Split(e.getenv("PILLION_TEST_WITHOUT"), ",") {
		out |= cures[name]
	}
	return out
}
