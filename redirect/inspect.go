// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"fmt"
	"slices"

	"github.com/pillionproxy/pillion/redirect/route"
)

// InspectRouting compares the sysctls, routes and rules of a plan with the host.
func (p Plan) InspectRouting() ([]Item, error) {
	items := p.inspectSysctls()
	for _, inspect := range []func() ([]Item, error){p.inspectRoutes, p.inspectRules} {
		more, err := inspect()
		if err != nil {
			return items, err
		}
		items = append(items, more...)
	}
	return items, nil
}

func (p Plan) inspectSysctls() []Item {
	now := ReadSysctls(p.Sysctls)
	var items []Item
	for i, s := range p.Sysctls {
		item := Item{Kind: "sysctl", Name: s.Name, State: StateOK, Detail: s.Why}
		if now[i] != s.Value {
			item.State, item.Detail = StateWrong, fmt.Sprintf("reads %q, must be %s", now[i], s.Value)
		}
		items = append(items, item)
	}
	return items
}

func (p Plan) inspectRoutes() ([]Item, error) {
	var items []Item
	for _, r := range p.Routes {
		have, err := route.Routes(r.Family.number(), r.Table)
		if err != nil {
			return nil, err
		}
		item := Item{Kind: "route", Name: fmt.Sprintf("IPv%d table %d %s", r.Family, r.Table, r.Link), State: StateOK, Detail: r.Why}
		if !slices.Contains(have, r.netlink()) {
			item.State, item.Detail = StateMissing, "run `pillion init` again"
		}
		items = append(items, item)
	}
	return items, nil
}

func (p Plan) inspectRules() ([]Item, error) {
	var items []Item
	for _, r := range p.Rules {
		have, err := route.Rules(r.Family.number(), r.Priority, r.Priority)
		if err != nil {
			return nil, err
		}
		item := Item{Kind: "rule", Name: fmt.Sprintf("IPv%d %d", r.Family, r.Priority), State: StateOK, Detail: r.Why}
		if !slices.Contains(have, r.netlink()) {
			item.State, item.Detail = StateMissing, "run `pillion init` again"
		}
		items = append(items, item)
	}
	return items, nil
}
