// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"slices"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect/route"
	"golang.org/x/sys/unix"
)

// Metrics of the routes in the capture table. Unbound sockets take the lowest: lo.
const (
	metricLoopback = 1
	metricDevice   = 1024 // plus the interface index
)

// MarkRoutes are the routes of a slot that deliver marked packets on this host.
func MarkRoutes(slot config.Slot, family Family, interfaces []Interface) []Route {
	var rs []Route
	for _, i := range interfaces {
		if !i.Up || family == IPv6 && !i.IPv6 {
			continue
		}
		r := Route{Family: family, Table: slot.TableCapture(), Link: i.Name, Index: i.Index, Metric: metricDevice + i.Index, Why: "the same for sockets bound to " + i.Name}
		if i.Loopback {
			r.Metric, r.Why = metricLoopback, "marked packets are delivered on this host"
		}
		rs = append(rs, r)
	}
	return append(rs, Route{Family: family, Table: slot.TableClosed(), Metric: 1, Why: "policy closed: the connection fails at once"})
}

// MarkRules are the rules of a slot that send packets to those routes by their mark.
func MarkRules(slot config.Slot, family Family) []Rule {
	mask := slot.Mask()
	dials := slot.Mark(6) // the two bits in which RoleDial and RoleDialReply agree
	rules := []Rule{
		{Mark: slot.Mark(config.RoleOut), Mask: mask, Table: slot.TableCapture(), Why: "the app's connections"},
		{Mark: slot.Mark(config.RoleDial), Mask: dials, Table: slot.TableCapture(), Why: "the proxy's dials in a client's name, and the answers"},
		{Mark: slot.Mark(config.RoleClosed), Mask: mask, Table: slot.TableClosed(), Why: "refused by policy"},
		{Mark: slot.Mark(config.RoleClosedBound), Mask: mask, Table: slot.TableCapture(), Why: "refused by policy, bound to a device: reset on lo"},
		{Mark: slot.Mark(config.RoleOut), Mask: mask, Why: "guard: should the route be gone"},
		{Mark: slot.Mark(config.RoleClosed), Mask: mask, Why: "guard"},
		{Mark: slot.Mark(config.RoleClosedBound), Mask: mask, Why: "guard"},
	}
	for i := range rules {
		rules[i].Family, rules[i].Priority = family, slot.RulePriority()+i
	}
	return rules
}

// HasRouting reports whether a rule of the slot is there. Rules are made last and removed first.
func HasRouting(slot config.Slot) (bool, error) {
	for _, f := range []Family{IPv4, IPv6} {
		want := MarkRules(slot, f)
		have, err := route.Rules(f.number(), slot.RulePriority(), slot.RulePriority()+len(want)-1)
		if err != nil {
			return false, err
		}
		for _, r := range want {
			if slices.Contains(have, r.netlink()) {
				return true, nil
			}
		}
	}
	return false, nil
}

// RemoveRouting removes the rules and routes of a slot, in both families.
func RemoveRouting(slot config.Slot) error {
	var errs []error
	for _, f := range []Family{IPv4, IPv6} {
		errs = append(errs, removeRules(slot, f))
	}
	for _, f := range []Family{IPv4, IPv6} {
		for _, table := range []int{slot.TableCapture(), slot.TableClosed()} {
			rs, err := route.Routes(f.number(), table)
			errs = append(errs, err)
			for _, r := range rs {
				errs = append(errs, route.DelRoute(r))
			}
		}
	}
	return errors.Join(errs...)
}

// removeRules removes those by marks, and those by ports that lead to the slot's table.
func removeRules(slot config.Slot, f Family) error {
	var errs []error
	for _, r := range MarkRules(slot, f) {
		errs = append(errs, route.DelRule(r.netlink()))
	}
	have, err := route.Rules(f.number(), slot.RulePriority(), slot.RulePriority()+rulesPerSlot-1)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		return errors.Join(errs...)
	}
	errs = append(errs, err)
	for _, r := range have {
		if r.Table == slot.TableCapture() && r.Ports != (config.PortRange{}) {
			errs = append(errs, route.DelRule(r))
		}
	}
	return errors.Join(errs...)
}

// rulesPerSlot is how many priorities a slot has (config.Slot.RulePriority).
const rulesPerSlot = 10

// number is the family as system calls have it.
func (f Family) number() int {
	if f == IPv6 {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

func (r Route) netlink() route.Route {
	return route.Route{Family: r.Family.number(), Table: r.Table, Index: r.Index, Metric: r.Metric}
}

func (r Rule) netlink() route.Rule {
	return route.Rule{Family: r.Family.number(), Priority: r.Priority, Mark: r.Mark, Mask: r.Mask, Ports: r.Ports, Table: r.Table}
}
