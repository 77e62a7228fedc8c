// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"bufio"
	"encoding/hex"
	"net/netip"
	"os"
	"strconv"
	"strings"
)

// Listening is a socket that listens.
type Listening struct {
	Local netip.AddrPort
	UID   uint32 // of who made it
}

// Reachable reports whether it could be meant by somebody outside.
func (l Listening) Reachable() bool { return !l.Local.Addr().Unmap().IsLoopback() }

// local reports whether it takes what comes to the loopback address of IPv4.
func (l Listening) local() bool {
	a := l.Local.Addr().Unmap()
	return a.Is4() && a.IsLoopback() || l.Local.Addr() == netip.IPv4Unspecified()
}

// ListeningSockets are those of this network namespace, as /proc/net/tcp and tcp6 have them
// (Documentation/networking/proc_net_tcp.rst). What cannot be read counts as nothing.
func ListeningSockets() []Listening {
	var found []Listening
	for _, file := range []string{"tcp", "tcp6"} {
		f, err := os.Open("/proc/thread-self/net/" + file)
		if err != nil {
			continue
		}
		for lines := bufio.NewScanner(f); lines.Scan(); {
			fields := strings.Fields(lines.Text()) // sl local_address rem_address st queues tr:when retrnsmt uid ...
			if len(fields) < 8 || fields[3] != "0A" {
				continue
			}
			uid, err := strconv.ParseUint(fields[7], 10, 32)
			if a, ok := parseProcAddress(fields[1]); ok && err == nil {
				found = append(found, Listening{a, uint32(uid)})
			}
		}
		f.Close()
	}
	return found
}

// parseProcAddress reads ADDRESS:PORT in hexadecimal: each 32-bit word of the address in the order of the host's bytes,
// which is little-endian on every machine that we build for.
func parseProcAddress(s string) (netip.AddrPort, bool) {
	address, port, _ := strings.Cut(s, ":")
	b, err := hex.DecodeString(address)
	if err != nil || len(b)%4 != 0 {
		return netip.AddrPort{}, false
	}
	for w := b; len(w) > 0; w = w[4:] {
		w[0], w[1], w[2], w[3] = w[3], w[2], w[1], w[0]
	}
	a, ok := netip.AddrFromSlice(b)
	p, err := strconv.ParseUint(port, 16, 16)
	return netip.AddrPortFrom(a, uint16(p)), ok && err == nil
}
