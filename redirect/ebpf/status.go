// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"fmt"
	"slices"

	"github.com/pillionproxy/pillion/bpf"
	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/cgroup"
)

// Inspect reports every capture of this network namespace, by slot. It changes nothing and needs no capability, but for
// the counters (CAP_SYS_ADMIN) and the hooks (CAP_NET_ADMIN).
func Inspect() ([]redirect.Report, error) {
	ours, _, err := listFilters()
	if err != nil {
		return nil, err
	}
	held, err := claimed()
	if err != nil {
		return nil, err
	}
	host, err := redirect.ReadHost(0)
	if err != nil {
		return nil, err
	}
	var reports []redirect.Report
	for slot := config.Slot(0); slot < config.Slots; slot++ {
		var mine []attached
		for _, f := range ours {
			if f.Note.Slot == slot && f.Note.Plan != heldPlan {
				mine = append(mine, f)
			}
		}
		_, isHeld := held[slot]
		if !isHeld && len(mine) == 0 {
			continue
		}
		r, err := inspect(slot, mine, isHeld, host)
		if err != nil {
			return nil, err
		}
		reports = append(reports, r)
	}
	return reports, nil
}

func inspect(slot config.Slot, mine []attached, held bool, host redirect.Host) (redirect.Report, error) {
	r := redirect.Report{Backend: Name, Slot: slot}
	policy := config.Capture{Shared: config.Shared{Slot: slot}}
	if len(mine) > 0 {
		policy.DialInbound, host.FixedSysctls = mine[0].Note.Dial, mine[0].Note.Fixed
	}
	plan := Plan(policy, host, redirect.Persistent)
	if held {
		r.Items = append(r.Items, redirect.Item{Kind: "process", Name: "pillion run", State: redirect.StateOK, Detail: "holds the hooks and filters"})
	} else {
		n := mine[0].Note
		r.CgroupID, r.Cgroup = n.CgroupID, cgroup.PathOf(n.CgroupID)
		r.Items = append(r.Items, inspectHooks(r, n)...)
		r.Items = append(r.Items, inspectFilters(plan.Filters, mine)...)
		r.Items = append(r.Items, redirect.InspectProxy(n.Ports, n.Down[0], n.Down[1])...)
		if len(n.Hooks) == len(hooks) {
			if policy, err := policyOf(n.Hooks[len(hooks)-1]); err == nil {
				r.Policy = &policy
			}
		}
		if m, err := mapOf(mine[0].Program, bpf.CaptureMapCounters); err == nil {
			r.Counters, _ = readCounters(m)
			m.Close()
		}
	}
	items, err := plan.InspectRouting()
	if err != nil {
		return r, err
	}
	r.Items = append(r.Items, items...)
	r.Items = append(r.Items, inspectPacketSockets()...)
	return r, nil
}

func inspectHooks(r redirect.Report, n note) []redirect.Item {
	var dir *cgroup.Dir
	err := fmt.Errorf("no directory with the id %d is mounted", n.CgroupID)
	if r.Cgroup != "" {
		dir, err = cgroup.Open(r.Cgroup)
	}
	if err == nil {
		defer dir.Close()
	}
	var items []redirect.Item
	for i, h := range hooks {
		item := redirect.Item{Kind: "hook", Name: h.Attach, State: redirect.StateOK, Detail: h.Why}
		switch {
		case err != nil:
			item.State, item.Detail = redirect.StateMissing, err.Error()
		default:
			ids, qerr := queryHooks(dir, h)
			switch {
			case qerr != nil:
				item.State, item.Detail = redirect.StateUnknown, qerr.Error()
			case i >= len(n.Hooks) || !slices.Contains(ids, n.Hooks[i]):
				item.State, item.Detail = redirect.StateMissing, "detached: connections pass uncaptured; run `pillion init` again, which takes CAP_SYS_ADMIN for this"
			}
		}
		items = append(items, item)
	}
	return items
}

func inspectFilters(want []redirect.Filter, mine []attached) []redirect.Item {
	var items []redirect.Item
	have := previous{filters: mine}
	for _, f := range want {
		item := redirect.Item{Kind: "filter", Name: f.Link + " " + f.Direction(), State: redirect.StateOK, Detail: f.Why}
		if _, ok := have.filterAt(f); !ok {
			item.State, item.Detail = redirect.StateMissing, "this interface is not captured; run `pillion init` again, which takes CAP_SYS_ADMIN for this"
		}
		items = append(items, item)
	}
	return items
}
