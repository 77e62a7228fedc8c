// SPDX-License-Identifier: Apache-2.0

package telemetry

import "fmt"

// Reason says how a connection ended. There is one token for each way, the same in the log, as a metric label, and in
// whatever the proxy answers by itself. New reasons go to the end: the values are array indices, the tokens an interface.
type Reason uint8

// The reasons.
const (
	OK                     Reason = iota // both sides ended their stream, and both ends were passed on
	ClientReset                          // the side that opened the connection reset it, or vanished while it was being dialled
	UpstreamReset                        // the side that was dialled reset the connection
	ClientTimeout                        // the client stopped acknowledging (keepalive or retransmission gave up)
	UpstreamTimeout                      // the same of the upstream
	UpstreamConnectRefused               // the dial was answered by a reset
	UpstreamConnectTimeout               // the dial was not answered within the connect timeout
	UpstreamUnreachable                  // no route, or a router or firewall said that there is no way
	OwnListener                          // the original destination is one of the proxy's own listeners
	OwnDialCaptured                      // the connection is a dial of this proxy that was captured: a loop, cut here
	ConnectionLimit                      // as many connections as may be are open, or there are no descriptors left
	PortsExhausted                       // every port of the dial range is in use towards this destination
	Shutdown                             // still open when the drain timeout ended, or when an immediate end was asked for
	InternalError                        // anything else; the error says what
	IdleTimeout                          // nothing was passed on for the idle timeout
	reasons                              // their number
)

var tokens = [reasons]string{
	OK:                     "ok",
	ClientReset:            "client_reset",
	UpstreamReset:          "upstream_reset",
	ClientTimeout:          "client_timeout",
	UpstreamTimeout:        "upstream_timeout",
	UpstreamConnectRefused: "upstream_connect_refused",
	UpstreamConnectTimeout: "upstream_connect_timeout",
	UpstreamUnreachable:    "upstream_unreachable",
	OwnListener:            "own_listener",
	OwnDialCaptured:        "own_dial_captured",
	ConnectionLimit:        "connection_limit",
	PortsExhausted:         "ports_exhausted",
	Shutdown:               "shutdown",
	InternalError:          "internal_error",
	IdleTimeout:            "idle_timeout",
}

func (r Reason) String() string {
	if r < reasons {
		return tokens[r]
	}
	return fmt.Sprintf("reason(%d)", uint8(r))
}

// MarshalText writes the token, for JSON.
func (r Reason) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// Direction says on whose side of a connection the app is.
type Direction uint8

// The directions.
const (
	Outbound   Direction = iota // the app opened the connection
	Inbound                     // the connection was opened to the app
	directions                  // their number
)

func (d Direction) String() string {
	switch d {
	case Outbound:
		return "outbound"
	case Inbound:
		return "inbound"
	default:
		return fmt.Sprintf("direction(%d)", uint8(d))
	}
}

// MarshalText writes the name, for JSON.
func (d Direction) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// Protocol is the transport protocol of a connection. One of UDP is a flow: the datagrams between two addresses, until there are
// none for a while.
type Protocol uint8

// The protocols.
const (
	TCP Protocol = iota
	UDP
	protocols // their number
)

func (p Protocol) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	default:
		return fmt.Sprintf("protocol(%d)", uint8(p))
	}
}

// MarshalText writes the name, for JSON.
func (p Protocol) MarshalText() ([]byte, error) { return []byte(p.String()), nil }
