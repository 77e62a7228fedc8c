// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"fmt"
	"slices"

	"github.com/pillionproxy/pillion/config"
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

// InspectProxy tells whether a proxy listens, and what happens while none does. It is no part of a capture.
func InspectProxy(l config.Listeners, down, downInbound config.FailureMode) []Item {
	there := ListeningSockets()
	var items []Item
	for _, p := range []struct {
		name string
		port uint16
		down config.FailureMode
	}{{"outbound", l.Outbound, down}, {"inbound", l.Inbound, downInbound}} {
		item := Item{Kind: "proxy", Name: fmt.Sprintf("%s :%d", p.name, p.port), State: StateOK, Detail: "listens"}
		if !slices.ContainsFunc(there, func(s Listening) bool { return s.Local.Port() == p.port && s.local() }) {
			item.State, item.Detail = StateMissing, "does not listen: new connections are "+downMeans[p.down]
		}
		items = append(items, item)
	}
	return items
}

var downMeans = map[config.FailureMode]string{
	config.Hold: "held until it does", config.Open: "let through uncaptured", config.Closed: "refused",
}
