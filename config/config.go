// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"
)

// Listeners are the ports of the proxy's three listeners. The capture hands connections to them; they are no port that an
// app or a peer ever sees.
type Listeners struct {
	Outbound   uint16 `json:"outbound"`    // what the app dials
	Inbound    uint16 `json:"inbound"`     // what dials the app, passed on in the client's name
	InboundOwn uint16 `json:"inbound_own"` // the same, for app listeners with a mark of their own: passed on from our address
}

// Contains reports whether the port is one of the three.
func (l Listeners) Contains(port uint16) bool {
	return port == l.Outbound || port == l.Inbound || port == l.InboundOwn
}

// Shared is what the capture and the proxy must agree on.
type Shared struct {
	Slot         Slot      `json:"slot"`
	Listeners    Listeners `json:"listeners"`
	DialOutbound PortRange `json:"dial_outbound"` // source ports of the proxy's dials for the app
	DialInbound  PortRange `json:"dial_inbound"`  // source ports of the proxy's dials to the app
}

// DefaultShared is what `pillion init` and `pillion proxy` use when nothing else is said.
func DefaultShared() Shared {
	return Shared{
		Listeners:    Listeners{PortOutbound, PortInbound, PortInboundOwn},
		DialOutbound: DialOutbound,
		DialInbound:  DialInbound,
	}
}

func (s Shared) problems() (errs []error) {
	if s.Slot >= Slots {
		errs = append(errs, fmt.Errorf("slot %d: must be below %d", s.Slot, Slots))
	}
	l := s.Listeners
	for _, p := range []struct {
		flag string
		port uint16
	}{{"--outbound-port", l.Outbound}, {"--inbound-port", l.Inbound}, {"--inbound-own-port", l.InboundOwn}} {
		if p.port == 0 {
			errs = append(errs, fmt.Errorf("%s: must be from 1 to 65535", p.flag))
		}
	}
	if l.Outbound == l.Inbound || l.Outbound == l.InboundOwn || l.Inbound == l.InboundOwn {
		errs = append(errs, fmt.Errorf("--outbound-port %d, --inbound-port %d, --inbound-own-port %d: must differ",
			l.Outbound, l.Inbound, l.InboundOwn))
	}
	ranges := []struct {
		flag string
		r    PortRange
	}{{"--dial-outbound", s.DialOutbound}, {"--dial-inbound", s.DialInbound}}
	for _, d := range ranges {
		if d.r.First == 0 || d.r.Last < d.r.First {
			errs = append(errs, fmt.Errorf("%s %s: not a port range", d.flag, d.r))
		}
		for _, p := range []uint16{l.Outbound, l.Inbound, l.InboundOwn} {
			if d.r.Contains(p) {
				errs = append(errs, fmt.Errorf("%s %s: contains the listener port %d", d.flag, d.r, p))
			}
		}
	}
	if s.DialOutbound.Overlaps(s.DialInbound) {
		errs = append(errs, fmt.Errorf("--dial-outbound %s and --dial-inbound %s: must not overlap: the capture tells the proxy's dials apart by them",
			s.DialOutbound, s.DialInbound))
	}
	return errs
}

// Capture is what the privileged step installs.
type Capture struct {
	Shared
	Cgroup             string      `json:"cgroup"`                     // cgroup2 directory; every process in it or below it is captured
	OnProxyDown        FailureMode `json:"on_proxy_down"`              // outbound
	OnProxyDownInbound FailureMode `json:"on_proxy_down_inbound"`      // inbound
	ProxyUID           uint32      `json:"proxy_uid"`                  // sockets made by this user are the proxy's, if their ports are
	TrustProxyUser     bool        `json:"trust_proxy_user,omitempty"` // whatever their ports are: a proxy that is not Pillion's
	Selection          Selection   `json:"selection,omitzero"`         // which of the connections
}

// DefaultCapture holds outbound and inbound connections until the proxy is up.
func DefaultCapture() Capture { return Capture{Shared: DefaultShared(), ProxyUID: ProxyUID} }

// Validate reports every problem at once.
func (c Capture) Validate() error {
	errs := c.problems()
	if c.ProxyUID == 0 {
		errs = append(errs, errors.New("--proxy-uid 0: root cannot be the proxy's user inside the captured cgroup: every root process would pass uncaptured"))
	}
	return errors.Join(append(errs, c.Selection.problems()...)...)
}

// Listen says on which addresses the proxy's three listeners are, and so which backends it can serve.
type Listen string

// The backends `ebpf` and `tproxy` hand over connections whose local address is that of another host, which takes
// CAP_NET_RAW. `redirect` rewrites that address to one of this host, inbound to that of the interface, and takes nothing.
const (
	ListenAuto     Listen = "auto"     // loopback, or any without the capability
	ListenLoopback Listen = "loopback" // 127.0.0.1 and ::1, for `ebpf` and `tproxy`
	ListenAny      Listen = "any"      // every address of this host, for `redirect`; with the capability, for all three
)

// Proxy configures the sidecar itself.
type Proxy struct {
	Shared
	Listen         Listen         `json:"listen"`
	ConnectTimeout time.Duration  `json:"connect_timeout"` // of a dial, in place of the app's own
	IdleTimeout    time.Duration  `json:"idle_timeout"`    // of a connection on which nothing is passed on; 0: none
	DrainTimeout   time.Duration  `json:"drain_timeout"`   // how long SIGTERM waits for live connections
	MaxConnections int            `json:"max_connections"` // 0: as many as the descriptor limit allows
	Admin          netip.AddrPort `json:"admin"`           // loopback only; invalid (zero) value: none
	Health         netip.AddrPort `json:"health"`          // metrics and health; invalid (zero) value: none
	LogLevel       slog.Level     `json:"log_level"`
	LogFormat      string         `json:"log_format"` // json, text, or auto: text on a terminal
}

// DefaultProxy is the sidecar of a pod.
func DefaultProxy() Proxy {
	return Proxy{
		Shared:         DefaultShared(),
		Listen:         ListenAuto,
		ConnectTimeout: 10 * time.Second,
		DrainTimeout:   30 * time.Second,
		Admin:          netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), PortAdmin),
		Health:         netip.AddrPortFrom(netip.IPv6Unspecified(), PortHealth),
		LogFormat:      "auto",
	}
}

// Validate reports every problem at once.
func (p Proxy) Validate() error {
	errs := p.problems()
	switch p.Listen {
	case ListenAuto, ListenLoopback, ListenAny:
	default:
		errs = append(errs, fmt.Errorf("--listen %q: must be auto, loopback or any", p.Listen))
	}
	if p.ConnectTimeout <= 0 {
		errs = append(errs, fmt.Errorf("--connect-timeout %s: must be positive", p.ConnectTimeout))
	}
	if p.IdleTimeout < 0 {
		errs = append(errs, fmt.Errorf("--idle-timeout %s: must not be negative (0: none)", p.IdleTimeout))
	}
	if p.DrainTimeout < 0 {
		errs = append(errs, fmt.Errorf("--drain-timeout %s: must not be negative", p.DrainTimeout))
	}
	if p.MaxConnections < 0 {
		errs = append(errs, fmt.Errorf("--max-connections %d: must not be negative (0: as many as descriptors allow)", p.MaxConnections))
	}
	if p.Admin.IsValid() && !p.Admin.Addr().IsLoopback() {
		errs = append(errs, fmt.Errorf("--admin %s: must be a loopback address: the admin interface shows what the app talks to, and has no authentication", p.Admin))
	}
	errs = append(errs, p.clashes()...)
	switch p.LogFormat {
	case "json", "text", "auto":
	default:
		errs = append(errs, fmt.Errorf("--log-format %q: must be json, text or auto", p.LogFormat))
	}
	return errors.Join(errs...)
}

// clashes are ports that two of the proxy's listeners want. The capture takes the three ports for the proxy's own on every
// address, so nothing else can be there; port 0 is any free one.
func (p Proxy) clashes() (errs []error) {
	for _, h := range []struct {
		flag string
		at   netip.AddrPort
	}{{"--admin", p.Admin}, {"--health", p.Health}} {
		if h.at.IsValid() && h.at.Port() != 0 && p.Listeners.Contains(h.at.Port()) {
			errs = append(errs, fmt.Errorf("%s %s: has the port of a listener (--outbound-port %d, --inbound-port %d, --inbound-own-port %d)",
				h.flag, h.at, p.Listeners.Outbound, p.Listeners.Inbound, p.Listeners.InboundOwn))
		}
	}
	if p.Admin.IsValid() && p.Admin.Port() != 0 && p.Admin.Port() == p.Health.Port() && (covers(p.Admin.Addr(), p.Health.Addr()) || covers(p.Health.Addr(), p.Admin.Addr())) {
		errs = append(errs, fmt.Errorf("--admin %s and --health %s: must differ", p.Admin, p.Health))
	}
	return errs
}

// covers reports whether a listener on a leaves no place for one on b: the same address, or all of them.
func covers(a, b netip.Addr) bool {
	return a == b || a.IsUnspecified() && (a.Is6() || b.Is4())
}
