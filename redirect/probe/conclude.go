// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"net/netip"

	"github.com/pillionproxy/pillion/redirect"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// Concluded says what a trial has shown. what is the subject of the sentence.
func Concluded(c redirect.Check, want, captured bool, err error, what string) redirect.Check {
	c.Proven = err == nil
	c.OK = err == nil && captured == want
	switch {
	case err != nil:
		c.Detail = err.Error()
	case captured && want:
		c.Detail = what + " is taken"
	case captured:
		c.Detail = what + " is captured, and must not be"
	case want:
		c.Detail = what + " passes uncaptured"
	default:
		c.Detail = what + " is left alone"
	}
	return c
}

// HasCapability reports whether this process has it in effect.
func HasCapability(c cap.Value) bool {
	ok, err := cap.GetProc().GetFlag(cap.Effective, c)
	return ok && err == nil
}

// Nobody is an address of a documentation range (RFC 5737, RFC 3849).
func Nobody(f redirect.Family) netip.Addr {
	if f == redirect.IPv6 {
		return netip.MustParseAddr("2001:db8::1")
	}
	return netip.AddrFrom4([4]byte{192, 0, 2, 1})
}
