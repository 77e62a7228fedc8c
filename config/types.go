// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"strconv"
	"strings"
)

// FailureMode says what becomes of a new connection while no proxy listens. It is a flag value.
type FailureMode uint32

// The failure modes. Their values are shared with bpf/capture.bpf.c.
const (
	Hold   FailureMode = iota // the SYN is dropped until a proxy listens; TCP's own retransmission then connects
	Open                      // the connection goes straight to its destination
	Closed                    // the connection fails at once
)

var failureModes = [...]string{"hold", "open", "closed"}

func (m FailureMode) String() string {
	if int(m) < len(failureModes) {
		return failureModes[m]
	}
	return "invalid(" + strconv.Itoa(int(m)) + ")"
}

// Set parses a mode by its name.
func (m *FailureMode) Set(s string) error {
	for i, n := range failureModes {
		if s == n {
			*m = FailureMode(i)
			return nil
		}
	}
	return fmt.Errorf("%q is none of hold, open, closed", s)
}

// Type names the value in help texts.
func (m *FailureMode) Type() string { return "hold|open|closed" }

// MarshalText writes the name, for JSON.
func (m FailureMode) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (m *FailureMode) UnmarshalText(b []byte) error { return m.Set(string(b)) }

// PortRange is an inclusive range of ports. It is a flag value, written FIRST-LAST.
type PortRange struct{ First, Last uint16 }

func (r PortRange) String() string { return fmt.Sprintf("%d-%d", r.First, r.Last) }

// Set parses FIRST-LAST.
func (r *PortRange) Set(s string) error {
	a, b, ok := strings.Cut(s, "-")
	first, err1 := strconv.ParseUint(strings.TrimSpace(a), 10, 16)
	last, err2 := strconv.ParseUint(strings.TrimSpace(b), 10, 16)
	if !ok || err1 != nil || err2 != nil {
		return fmt.Errorf("%q is not a port range: write FIRST-LAST, each from 1 to 65535", s)
	}
	if first == 0 || last < first {
		return fmt.Errorf("%q is not a port range: FIRST must be at least 1 and at most LAST", s)
	}
	r.First, r.Last = uint16(first), uint16(last)
	return nil
}

// Type names the value in help texts.
func (r *PortRange) Type() string { return "first-last" }

// MarshalText writes FIRST-LAST, for JSON.
func (r PortRange) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (r *PortRange) UnmarshalText(b []byte) error { return r.Set(string(b)) }

// Contains reports whether the port lies in the range.
func (r PortRange) Contains(port uint16) bool { return port >= r.First && port <= r.Last }

// Overlaps reports whether the two ranges share a port.
func (r PortRange) Overlaps(o PortRange) bool { return r.First <= o.Last && o.First <= r.Last }

// Len is the number of ports in the range.
func (r PortRange) Len() int { return int(r.Last) - int(r.First) + 1 }
