// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// States of a TCP socket, as the kernel numbers them (include/net/tcp_states.h).
const (
	Established = 1
	SynSent     = 2
	CloseWait   = 8
	Listen      = 10
)

// Socket is a TCP socket of a namespace, as /proc/net/tcp and tcp6 show it.
type Socket struct {
	Local, Remote netip.AddrPort // mapped addresses are shown as such
	State         int
	Unsent        int // bytes written and not acknowledged
	Timer         int // what the socket waits for; see below
	Retransmits   int // of what is unanswered now
	UID           int
}

// TimerProbe is the timer of a socket whose peer has closed its window: it may send nothing but probes.
const TimerProbe = 4

// Sockets lists the TCP sockets of the namespace.
func (ns *Namespace) Sockets() []Socket {
	ns.t.Helper()
	var all []Socket
	for _, name := range []string{"tcp", "tcp6"} {
		var b []byte
		var err error
		ns.Do(func() { b, err = os.ReadFile("/proc/thread-self/net/" + name) })
		if err != nil {
			ns.t.Fatalf("testnet: %v", err)
		}
		for _, line := range strings.Split(strings.TrimSpace(string(b)), "\n")[1:] {
			s, err := parseSocket(strings.Fields(line))
			if err != nil {
				ns.t.Fatalf("testnet: %q: %v", line, err)
			}
			all = append(all, s)
		}
	}
	return all
}

// WaitSocket waits for a socket that matches.
func (ns *Namespace) WaitSocket(t testing.TB, what string, match func(Socket) bool) Socket {
	t.Helper()
	var found Socket
	Wait(t, what, func() bool {
		for _, s := range ns.Sockets() {
			if match(s) {
				found = s
				return true
			}
		}
		time.Sleep(50 * time.Millisecond) // each look makes the kernel walk its whole table of connections: milliseconds of work
		return false
	})
	return found
}

// parseSocket reads one line: sl local remote st tx:rx tr:when retrnsmt uid ...
func parseSocket(f []string) (s Socket, err error) {
	if len(f) < 8 {
		return s, fmt.Errorf("%d fields", len(f))
	}
	if s.Local, err = parseHexAddr(f[1]); err != nil {
		return s, err
	}
	if s.Remote, err = parseHexAddr(f[2]); err != nil {
		return s, err
	}
	tx, _, _ := strings.Cut(f[4], ":")
	timer, _, _ := strings.Cut(f[5], ":")
	numbers := []struct {
		text string
		base int
		to   *int
	}{{f[3], 16, &s.State}, {tx, 16, &s.Unsent}, {timer, 16, &s.Timer}, {f[6], 16, &s.Retransmits}, {f[7], 10, &s.UID}}
	for _, n := range numbers {
		v, err := strconv.ParseInt(n.text, n.base, 64)
		if err != nil {
			return s, err
		}
		*n.to = int(v)
	}
	return s, nil
}

// parseHexAddr reads an address as the kernel prints it: words of 32 bits in the order of the machine.
func parseHexAddr(text string) (netip.AddrPort, error) {
	host, port, _ := strings.Cut(text, ":")
	raw, err := hex.DecodeString(host)
	if err != nil {
		return netip.AddrPort{}, err
	}
	for i := 0; i+4 <= len(raw); i += 4 {
		binary.NativeEndian.PutUint32(raw[i:], binary.BigEndian.Uint32(raw[i:]))
	}
	addr, ok := netip.AddrFromSlice(raw)
	p, err := strconv.ParseUint(port, 16, 16)
	if err != nil || !ok {
		return netip.AddrPort{}, fmt.Errorf("%q is no address: %v", text, err)
	}
	return netip.AddrPortFrom(addr, uint16(p)), nil
}

// Bound reports whether some process listens on the port in the namespace.
func (ns *Namespace) Bound(port uint16) bool {
	ns.t.Helper()
	for _, s := range ns.Sockets() {
		if s.State == Listen && s.Local.Port() == port {
			return true
		}
	}
	return false
}
