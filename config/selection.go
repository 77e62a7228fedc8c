// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"
)

// Selection says which connections are captured. The zero value selects all.
//
// The dimensions are independent, and a connection is captured if every one of them lets it in: no entry of Exclude
// matches it, and Include is empty or one of its entries does. So an exclusion always wins, and the order of entries never
// matters. What the selection says is the same in every backend; one that cannot honour a dimension refuses it.
//
// Never captured, whatever is selected: the proxy's own connections, and those to loopback or from an address to itself.
type Selection struct {
	OutboundPorts      Selector[PortRange]     `json:"outbound_ports,omitzero"`      // the destination's port
	OutboundCIDRs      Selector[netip.Prefix]  `json:"outbound_cidrs,omitzero"`      // the destination's address
	OutboundInterfaces Selector[InterfaceName] `json:"outbound_interfaces,omitzero"` // by which the connection would leave
	UIDs               Selector[IDRange]       `json:"uids,omitzero"`                // of who makes the socket of an outbound connection
	GIDs               Selector[IDRange]       `json:"gids,omitzero"`                // the same, the group
	InboundPorts       Selector[PortRange]     `json:"inbound_ports,omitzero"`       // the app's port
	InboundCIDRs       Selector[netip.Prefix]  `json:"inbound_cidrs,omitzero"`       // the client's address
	InboundInterfaces  Selector[InterfaceName] `json:"inbound_interfaces,omitzero"`  // by which the connection comes in
	ExcludeCgroups     []string                `json:"exclude_cgroups,omitempty"`    // cgroup2 directories below the captured one: neither direction
}

// Selector is one dimension of a Selection.
type Selector[T any] struct {
	Include []T `json:"include,omitempty"` // empty: everything
	Exclude []T `json:"exclude,omitempty"`
}

// IsZero reports whether the dimension selects everything.
func (s Selector[T]) IsZero() bool { return len(s.Include) == 0 && len(s.Exclude) == 0 }

// LetsIn reports whether the dimension selects a value, given which entries match it.
func (s Selector[T]) LetsIn(matches func(T) bool) bool {
	in, _ := s.find(matches)
	return in
}

// find is the entry that decides whether the dimension lets v in; nil where it does for no entry's sake, or does not for
// want of one.
func (s Selector[T]) find(matches func(T) bool) (in bool, by *T) {
	for i := range s.Exclude {
		if matches(s.Exclude[i]) {
			return false, &s.Exclude[i]
		}
	}
	for i := range s.Include {
		if matches(s.Include[i]) {
			return true, &s.Include[i]
		}
	}
	return len(s.Include) == 0, nil
}

// Flow is a connection as a Selection sees it. Inbound, its address is the client's and its port the app's; outbound, both
// are the destination's.
type Flow struct {
	Inbound   bool           `json:"inbound"`
	Address   netip.AddrPort `json:"address"`
	UID       uint32         `json:"uid"` // outbound
	GID       uint32         `json:"gid"` // outbound
	Interface InterfaceName  `json:"interface,omitempty"`
	Cgroup    string         `json:"cgroup,omitempty"`
}

// Verdict is what a Selection says of a Flow.
type Verdict struct {
	Captured bool   `json:"captured"`
	Rule     string `json:"rule"` // that gives it, as the flag has it
}

// Judge tells whether a flow is captured and which entry decides. Dimensions are asked in the order of the fields of
// Selection; the first that does not let the flow in is named.
func (s Selection) Judge(f Flow) Verdict {
	addr := f.Address.Addr().Unmap()
	for _, excluded := range s.ExcludeCgroups {
		if f.Cgroup == excluded || strings.HasPrefix(f.Cgroup, strings.TrimSuffix(excluded, "/")+"/") {
			return Verdict{Rule: "--exclude-cgroups " + excluded}
		}
	}
	port := func(r PortRange) bool { return r.Contains(f.Address.Port()) }
	cidr := func(p netip.Prefix) bool { return p.Contains(addr) }
	link := func(n InterfaceName) bool { return n.Matches(string(f.Interface)) }
	var verdicts []Verdict
	if f.Inbound {
		verdicts = []Verdict{
			judge(s.InboundPorts, "inbound-ports", port),
			judge(s.InboundCIDRs, "inbound-cidrs", cidr),
			judge(s.InboundInterfaces, "inbound-interfaces", link),
		}
	} else {
		verdicts = []Verdict{
			judge(s.OutboundPorts, "outbound-ports", port),
			judge(s.OutboundCIDRs, "outbound-cidrs", cidr),
			judge(s.OutboundInterfaces, "outbound-interfaces", link),
			judge(s.UIDs, "uids", func(r IDRange) bool { return r.Contains(f.UID) }),
			judge(s.GIDs, "gids", func(r IDRange) bool { return r.Contains(f.GID) }),
		}
	}
	captured := Verdict{Captured: true}
	for _, v := range verdicts {
		switch {
		case !v.Captured:
			return v
		case captured.Rule == "":
			captured.Rule = v.Rule
		}
	}
	if captured.Rule == "" {
		captured.Rule = "nothing excludes it"
	}
	return captured
}

func judge[T fmt.Stringer](s Selector[T], flag string, matches func(T) bool) Verdict {
	in, by := s.find(matches)
	switch {
	case in && by != nil:
		return Verdict{true, fmt.Sprintf("--include-%s %s", flag, *by)}
	case in:
		return Verdict{Captured: true}
	case by != nil:
		return Verdict{Rule: fmt.Sprintf("--exclude-%s %s", flag, *by)}
	default:
		return Verdict{Rule: fmt.Sprintf("no entry of --include-%s", flag)}
	}
}

// Judge tells what becomes of a flow under the whole policy while a proxy listens. own reports whether an address is this
// host's.
func (c Capture) Judge(f Flow, own func(netip.Addr) bool) Verdict {
	addr := f.Address.Addr().Unmap()
	switch {
	case f.Inbound && c.Listeners.Contains(f.Address.Port()):
		return Verdict{Rule: "a listener of the proxy itself"}
	case f.Inbound:
		return c.Selection.Judge(f)
	case f.UID == c.ProxyUID:
		rule := fmt.Sprintf("--proxy-uid %d: the proxy's own connection", c.ProxyUID)
		if !c.TrustProxyUser {
			rule += fmt.Sprintf(", from its ports %s or %s; from any other it is an app's", c.DialOutbound, c.DialInbound)
		}
		return Verdict{Rule: rule}
	case addr.IsLoopback(), addr.IsUnspecified(), own(addr):
		return Verdict{Rule: "an address of this host: such a connection never leaves it"}
	default:
		return c.Selection.Judge(f)
	}
}

// Flags writes the selection as command line flags; none for everything.
func (s Selection) Flags() []string {
	list := slices.Concat(
		flags("outbound-ports", s.OutboundPorts), flags("outbound-cidrs", s.OutboundCIDRs), flags("outbound-interfaces", s.OutboundInterfaces),
		flags("uids", s.UIDs), flags("gids", s.GIDs),
		flags("inbound-ports", s.InboundPorts), flags("inbound-cidrs", s.InboundCIDRs), flags("inbound-interfaces", s.InboundInterfaces),
	)
	for _, path := range s.ExcludeCgroups {
		list = append(list, "--exclude-cgroups="+path)
	}
	return list
}

func flags[T fmt.Stringer](name string, s Selector[T]) (list []string) {
	for _, kind := range []struct {
		flag    string
		entries []T
	}{{"--include-", s.Include}, {"--exclude-", s.Exclude}} {
		if len(kind.entries) == 0 {
			continue
		}
		texts := make([]string, len(kind.entries))
		for i, e := range kind.entries {
			texts[i] = e.String()
		}
		list = append(list, kind.flag+name+"="+strings.Join(texts, ","))
	}
	return list
}

// maxEntries bounds one dimension. Peers' users have some hundred; backends pay for each.
const maxEntries = 4096

func (s Selection) problems() (errs []error) {
	for _, d := range []struct {
		flag string
		n    int
	}{
		{"outbound-ports", s.OutboundPorts.size()},
		{"outbound-cidrs", s.OutboundCIDRs.size()},
		{"outbound-interfaces", s.OutboundInterfaces.size()},
		{"uids", s.UIDs.size()},
		{"gids", s.GIDs.size()},
		{"inbound-ports", s.InboundPorts.size()},
		{"inbound-cidrs", s.InboundCIDRs.size()},
		{"inbound-interfaces", s.InboundInterfaces.size()},
	} {
		if d.n > maxEntries {
			errs = append(errs, fmt.Errorf("--include-%s, --exclude-%s: %d entries; at most %d", d.flag, d.flag, d.n, maxEntries))
		}
	}
	for _, c := range s.ExcludeCgroups {
		if !strings.HasPrefix(c, "/") || path.Clean(c) != c {
			errs = append(errs, fmt.Errorf("--exclude-cgroups %q: must be the absolute path of a cgroup2 directory", c))
		}
	}
	return errs
}

func (s Selector[T]) size() int { return len(s.Include) + len(s.Exclude) }

// IsZero reports whether everything is selected.
func (s Selection) IsZero() bool {
	return s.OutboundPorts.IsZero() && s.OutboundCIDRs.IsZero() && s.OutboundInterfaces.IsZero() &&
		s.UIDs.IsZero() && s.GIDs.IsZero() &&
		s.InboundPorts.IsZero() && s.InboundCIDRs.IsZero() && s.InboundInterfaces.IsZero() && len(s.ExcludeCgroups) == 0
}
