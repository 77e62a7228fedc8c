// SPDX-License-Identifier: Apache-2.0

package config

import "fmt"

// Ports of the sidecar. They avoid those of Istio (15000-15090) and Linkerd (4140-4191), so that both can live in one
// pod beside us.
const (
	PortAdmin    uint16 = 16000 // admin, loopback only
	PortOutbound uint16 = 16001 // what the app dials
	PortInbound  uint16 = 16006 // what dials the app
	// PortInboundOwn takes inbound connections for an app listener that carries a packet mark of its own: its answers
	// would not come back to a dial in the client's name, so the proxy dials such an app from its own address.
	PortInboundOwn uint16 = 16007
	PortHealth     uint16 = 16020 // metrics and health
)

// ProxyUID is the user that the sidecar runs as by default, and by which the capture knows the sidecar's own sockets.
const ProxyUID uint32 = 1666

// Ports from which the proxy dials. They lie outside Linux's default ephemeral range (32768-60999), so that the dials of
// the sidecar never use up a port that the app could have had, and a client's port is never that of a dial in its name.
var (
	DialOutbound = PortRange{20000, 26999}
	DialInbound  = PortRange{27000, 32767}
)

// Role is what a packet or socket is to the capture. It is written into three bits of the packet mark; every other bit
// belongs to the app and to the host, and is neither read nor changed.
type Role uint32

// The seven roles. Their values are shared with bpf/capture.bpf.c.
const (
	RoleOut         Role = 1 // the app's captured connection: routed to lo, given to the outbound listener there
	RoleClosed      Role = 2 // the app's connection under the policy `closed`: routed to an unreachable route
	RoleProxy       Role = 3 // a dial of a proxy that the capture cannot know otherwise: never captured
	RoleDial        Role = 4 // the proxy's dial to the app, in the client's name
	RoleDialReply   Role = 5 // the app's side of such a dial
	RoleClosedBound Role = 6 // as RoleClosed, for a socket bound to a device: reset on lo
	RoleReply       Role = 7 // the proxy's answers to the app
)

// The probe of `verify` marks its connections with a bit that no slot uses, and a rule behind those of all slots sends what
// carries it, and was not captured, to lo: nothing of a probe ever leaves the host.
const (
	ProbeMark     uint32 = 1 << 31
	ProbeTable           = 166 + 2*Slots
	ProbePriority        = 60 + 10*Slots
)

// Slots is how many captures may live in one network namespace side by side: each has three mark bits, two tables and a
// block of rule priorities of its own.
const Slots = 8

// Slot names one of them. Slot 0 is the default of `pillion init`; `pillion run` takes a free one from the top.
type Slot uint8

// Shift is the lowest of the slot's three mark bits. Slot 0 has bits 28-30: below them lie the bits that Tailscale
// (16-23), kube-proxy (14, 15) and Cilium (8-11) use, above them the sign bit, which some tools print wrongly. The slots
// of `pillion run` reach down to bit 7; only sockets of the commands that they capture ever carry these.
func (s Slot) Shift() uint32 { return 28 - 3*uint32(s) }

// Mask covers the slot's three mark bits.
func (s Slot) Mask() uint32 { return 7 << s.Shift() }

// Mark is the role as the slot writes it into a packet mark.
func (s Slot) Mark(r Role) uint32 { return uint32(r) << s.Shift() }

// TableCapture is the routing table that delivers marked packets to lo.
func (s Slot) TableCapture() int { return 166 + 2*int(s) }

// TableClosed is the routing table with nothing but an unreachable route.
func (s Slot) TableClosed() int { return 167 + 2*int(s) }

// RulePriority is the first of the ten rule priorities of the slot. They lie after the table `local` (0), so that local
// destinations are never taken, and before everything that the host routes by.
func (s Slot) RulePriority() int { return 60 + 10*int(s) }

// FilterPriority is the priority of the slot's tc filters.
func (s Slot) FilterPriority() uint16 { return 166 + uint16(s) }

func (s Slot) String() string { return fmt.Sprintf("%d", uint8(s)) }
