// SPDX-License-Identifier: Apache-2.0

package compat

import "github.com/pillionproxy/pillion/config"

// Apply puts what was asked for into a policy, but for the flags that were given otherwise: those win, each as a whole. It
// returns the names of the flags that kept their value against a wish.
func (r Result) Apply(policy *config.Capture, given func(flag string) bool) (kept []string) {
	m := merger{given: given}
	s, into := r.Selection, &policy.Selection
	selector(&m, "outbound-ports", s.OutboundPorts, &into.OutboundPorts)
	selector(&m, "outbound-cidrs", s.OutboundCIDRs, &into.OutboundCIDRs)
	selector(&m, "outbound-interfaces", s.OutboundInterfaces, &into.OutboundInterfaces)
	selector(&m, "uids", s.UIDs, &into.UIDs)
	selector(&m, "gids", s.GIDs, &into.GIDs)
	selector(&m, "inbound-ports", s.InboundPorts, &into.InboundPorts)
	selector(&m, "inbound-cidrs", s.InboundCIDRs, &into.InboundCIDRs)
	selector(&m, "inbound-interfaces", s.InboundInterfaces, &into.InboundInterfaces)
	value(&m, "proxy-uid", r.ProxyUID, &policy.ProxyUID)
	value(&m, "outbound-port", r.Outbound, &policy.Listeners.Outbound)
	value(&m, "inbound-port", r.Inbound, &policy.Listeners.Inbound)
	return m.kept
}

type merger struct {
	given func(string) bool
	kept  []string
}

// may reports whether a wish for a flag is heeded.
func (m *merger) may(flag string) bool {
	if m.given(flag) {
		m.kept = append(m.kept, flag)
		return false
	}
	return true
}

func selector[T any](m *merger, name string, from config.Selector[T], to *config.Selector[T]) {
	if len(from.Include) > 0 && m.may("include-"+name) {
		to.Include = from.Include
	}
	if len(from.Exclude) > 0 && m.may("exclude-"+name) {
		to.Exclude = from.Exclude
	}
}

func value[T comparable](m *merger, flag string, from T, to *T) {
	var none T
	if from != none && m.may(flag) {
		*to = from
	}
}
