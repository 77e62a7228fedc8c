// SPDX-License-Identifier: Apache-2.0

package config

import "net/netip"

// Witness is a flow that shows something of a selection: that it captures what it should, or that one of its dimensions
// leaves alone what it should.
type Witness struct {
	Flow
	Verdict
}

// Witnesses are flows by which a selection can be tried, each as near to base as can be: one that is captured, and one for
// each dimension that keeps some out, which it alone does. The first is missing if a dimension lets in nothing of the
// family of base; and it is not captured if base's interface or cgroup is not, which stay as they are. usable, if not nil,
// says which flows can be had.
func (s Selection) Witnesses(base Flow, usable func(Flow) bool) []Witness {
	dimensions := []dimension{addressOf(s.OutboundCIDRs), portOf(s.OutboundPorts), uidOf(s.UIDs), gidOf(s.GIDs)}
	if base.Inbound {
		dimensions = []dimension{addressOf(s.InboundCIDRs), portOf(s.InboundPorts)}
	}
	search := func(f Flow, d dimension, in bool) (Flow, bool) {
		if !in && d.all {
			return f, false
		}
		for _, c := range append([]Flow{f, d.as(f, base)}, d.near(f)...) {
			if d.letsIn(c) == in && (usable == nil || usable(c)) {
				return c, true
			}
		}
		return f, false
	}
	captured, found := base, true
	for _, d := range dimensions {
		var ok bool
		captured, ok = search(captured, d, true)
		found = found && ok
	}
	var list []Witness
	if found {
		list = append(list, Witness{captured, s.Judge(captured)})
	}
	for _, d := range dimensions {
		if f, ok := search(captured, d, false); ok {
			list = append(list, Witness{f, s.Judge(f)})
		}
	}
	return list
}

// dimension is one of a Selection, as far as flows are tried by it.
type dimension struct {
	all    bool // no entries
	letsIn func(Flow) bool
	as     func(f, other Flow) Flow // the flow with the value of the other
	near   func(Flow) []Flow        // the flow with other values, at the edges of the entries
}

func addressOf(s Selector[netip.Prefix]) dimension {
	return dimension{s.IsZero(), func(f Flow) bool {
		return s.LetsIn(func(p netip.Prefix) bool { return p.Contains(f.Address.Addr().Unmap()) })
	}, func(f, other Flow) Flow {
		f.Address = netip.AddrPortFrom(other.Address.Addr(), f.Address.Port())
		return f
	}, func(f Flow) (list []Flow) {
		for _, p := range append(s.Include[:len(s.Include):len(s.Include)], s.Exclude...) {
			if p.Addr().Is4() != f.Address.Addr().Unmap().Is4() {
				continue
			}
			first, last := p.Addr(), lastOf(p)
			for _, a := range []netip.Addr{first.Next(), first, last, first.Prev(), last.Next()} {
				if a.IsValid() && !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast() && !a.IsLinkLocalUnicast() {
					g := f
					g.Address = netip.AddrPortFrom(a, f.Address.Port())
					list = append(list, g)
				}
			}
		}
		return list
	}}
}

func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(b) // of a length that an address has
	return last
}

func portOf(s Selector[PortRange]) dimension {
	return dimension{s.IsZero(), func(f Flow) bool {
		return s.LetsIn(func(r PortRange) bool { return r.Contains(f.Address.Port()) })
	}, func(f, other Flow) Flow {
		f.Address = netip.AddrPortFrom(f.Address.Addr(), other.Address.Port())
		return f
	}, func(f Flow) (list []Flow) {
		for _, r := range append(s.Include[:len(s.Include):len(s.Include)], s.Exclude...) {
			for _, port := range edges(uint64(r.First), uint64(r.Last), 1<<16-1) {
				if port != 0 { // nobody can listen there
					g := f
					g.Address = netip.AddrPortFrom(f.Address.Addr(), uint16(port))
					list = append(list, g)
				}
			}
		}
		return list
	}}
}

func uidOf(s Selector[IDRange]) dimension {
	return idOf(s, func(f *Flow) *uint32 { return &f.UID })
}

func gidOf(s Selector[IDRange]) dimension {
	return idOf(s, func(f *Flow) *uint32 { return &f.GID })
}

func idOf(s Selector[IDRange], id func(*Flow) *uint32) dimension {
	return dimension{s.IsZero(), func(f Flow) bool {
		return s.LetsIn(func(r IDRange) bool { return r.Contains(*id(&f)) })
	}, func(f, other Flow) Flow {
		*id(&f) = *id(&other)
		return f
	}, func(f Flow) (list []Flow) {
		for _, r := range append(s.Include[:len(s.Include):len(s.Include)], s.Exclude...) {
			for _, v := range edges(uint64(r.First), uint64(r.Last), 1<<32-2) {
				g := f
				*id(&g) = uint32(v)
				list = append(list, g)
			}
		}
		return list
	}}
}

// edges are the first and last of a range, and what lies beside them.
func edges(first, last, most uint64) []uint64 {
	list := []uint64{first, last}
	if last < most {
		list = append(list, last+1)
	}
	if first > 0 {
		list = append(list, first-1)
	}
	return list
}
