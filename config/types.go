// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"math"
	"strconv"
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

func (r PortRange) String() string {
	if r.First == r.Last {
		return strconv.Itoa(int(r.First))
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// Set parses FIRST-LAST, or one port. Port 0 cannot be bound to, so it is none of a range of ports to use.
func (r *PortRange) Set(s string) error {
	first, last, err := bounds(s, math.MaxUint16)
	if err != nil || first == 0 {
		return fmt.Errorf("%q is not a port range: write FIRST-LAST, from 1 to 65535", s)
	}
	r.First, r.Last = uint16(first), uint16(last)
	return nil
}

// Type names the value in help texts.
func (r *PortRange) Type() string { return "first-last" }

// MarshalText writes FIRST-LAST, or the one port, for JSON.
func (r PortRange) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (r *PortRange) UnmarshalText(b []byte) error {
	first, last, err := bounds(string(b), math.MaxUint16)
	*r = PortRange{uint16(first), uint16(last)}
	return err
}

// Contains reports whether the port lies in the range.
func (r PortRange) Contains(port uint16) bool { return port >= r.First && port <= r.Last }

// Overlaps reports whether the two ranges share a port.
func (r PortRange) Overlaps(o PortRange) bool { return r.First <= o.Last && o.First <= r.Last }

// Len is the number of ports in the range.
func (r PortRange) Len() int { return int(r.Last) - int(r.First) + 1 }
