// SPDX-License-Identifier: Apache-2.0

// Package route is the little of rtnetlink that the capture needs: rules and routes that are added when they are not
// there, removed when they are, and listed without losing a row.
//
// What always holds: adding twice is adding once, removing what is not there is no error, and only what a caller names is
// touched.
package route

import (
	"errors"
	"fmt"
	"net"

	"github.com/pillionproxy/pillion/config"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// dumpTries bounds the repetition of a listing that the kernel interrupted because something changed meanwhile.
const dumpTries = 20

// List runs a netlink listing until it is complete.
func List[T any](list func() ([]T, error)) ([]T, error) {
	for try := 1; ; try++ {
		rows, err := list()
		if !errors.Is(err, netlink.ErrDumpInterrupted) || try == dumpTries {
			return rows, err
		}
	}
}

// Rule sends packets to a table, or refuses them where Table is 0: those with a mark, or, where there are Ports, TCP
// packets that this host sends to one of them.
type Rule struct {
	Family     int // unix.AF_INET, unix.AF_INET6
	Priority   int
	Mark, Mask uint32
	Ports      config.PortRange
	Table      int
}

func (r Rule) netlink() *netlink.Rule {
	n := netlink.NewRule()
	n.Family, n.Priority, n.Mark, n.Mask, n.Table = r.Family, r.Priority, r.Mark, &r.Mask, r.Table
	if r.Ports != (config.PortRange{}) {
		n.IifName, n.IPProto, n.Dport = "lo", unix.IPPROTO_TCP, netlink.NewRulePortRange(r.Ports.First, r.Ports.Last)
		n.Mask = nil
	}
	if r.Table == 0 {
		n.Type, n.Table = unix.RTN_UNREACHABLE, unix.RT_TABLE_UNSPEC
	}
	return n
}

// Rules lists the rules of a family with priorities from first to last. Others' rules may be among them.
func Rules(family, first, last int) ([]Rule, error) {
	rows, err := List(func() ([]netlink.Rule, error) { return netlink.RuleList(family) })
	if err != nil {
		return nil, fmt.Errorf("list rules: %w", err)
	}
	var rules []Rule
	for _, n := range rows {
		if n.Priority < first || n.Priority > last {
			continue
		}
		r := Rule{Family: family, Priority: n.Priority, Mark: n.Mark, Table: max(n.Table, 0)}
		if n.Mask != nil {
			r.Mask = *n.Mask
		}
		if n.Dport != nil {
			r.Ports = config.PortRange{First: n.Dport.Start, Last: n.Dport.End}
		}
		if n.Type == unix.RTN_UNREACHABLE {
			r.Table = 0
		}
		rules = append(rules, r)
	}
	return rules, nil
}

// AddRule adds the rule; added is false where it was there.
func AddRule(r Rule) (added bool, err error) {
	have, err := Rules(r.Family, r.Priority, r.Priority)
	if err != nil {
		return false, err
	}
	for _, h := range have {
		if h == r {
			return false, nil
		}
	}
	if err := netlink.RuleAdd(r.netlink()); err != nil && !errors.Is(err, unix.EEXIST) {
		return false, fmt.Errorf("add rule %d: %w", r.Priority, err)
	}
	return true, nil
}

// DelRule removes the rule as often as it is there.
func DelRule(r Rule) error {
	for {
		err := netlink.RuleDel(r.netlink())
		if missing(err) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("delete rule %d: %w", r.Priority, err)
		}
	}
}

// Route is a default route: local through the link Index, or unreachable where Index is 0.
type Route struct {
	Family int
	Table  int
	Index  int
	Metric int
}

func (r Route) netlink() *netlink.Route {
	n := &netlink.Route{
		Family: r.Family, Table: r.Table, Priority: r.Metric, LinkIndex: r.Index,
		Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST, Dst: everything(r.Family),
	}
	if r.Index == 0 {
		n.Type, n.Scope = unix.RTN_UNREACHABLE, unix.RT_SCOPE_UNIVERSE
	}
	return n
}

func everything(family int) *net.IPNet {
	if family == unix.AF_INET {
		return &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	}
	return &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
}

// Routes lists the default routes of a table that are of our two kinds.
func Routes(family, table int) ([]Route, error) {
	rows, err := List(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(family, &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("list routes of table %d: %w", table, err)
	}
	var routes []Route
	for _, n := range rows {
		r := Route{Family: family, Table: table, Index: n.LinkIndex, Metric: n.Priority}
		switch n.Type {
		case unix.RTN_UNREACHABLE:
			r.Index = 0 // IPv6 names lo here
		case unix.RTN_LOCAL:
		default:
			continue
		}
		routes = append(routes, r)
	}
	return routes, nil
}

// AddRoute adds the route; added is false where it was there.
func AddRoute(r Route) (added bool, err error) {
	have, err := Routes(r.Family, r.Table)
	if err != nil {
		return false, err
	}
	for _, h := range have {
		if h == r {
			return false, nil
		}
	}
	if err := netlink.RouteReplace(r.netlink()); err != nil {
		return false, fmt.Errorf("add route to table %d: %w", r.Table, err)
	}
	return true, nil
}

// DelRoute removes the route.
func DelRoute(r Route) error {
	if err := netlink.RouteDel(r.netlink()); err != nil && !missing(err) {
		return fmt.Errorf("delete route of table %d: %w", r.Table, err)
	}
	return nil
}

// missing reports whether a deletion failed because there was nothing, or nothing any more.
func missing(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EAFNOSUPPORT)
}
