// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/probe"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// Probe proves a capture by real connections. It must run in a process inside the captured cgroup, with the capabilities
// of the installer; package bootstrap starts one.
//
// Each connection is made to a listener of the probe's own (the decoy). Not captured, it arrives there from the very port
// that was dialled from. Captured, it arrives at the proxy's listener, or, where a proxy runs, at the decoy from a port of
// the proxy's. So both answers come as a connection, none as silence. Where no proxy runs, the probe borrows its port, with
// a filter on it that drops every SYN but the probe's own: a connection of anybody else waits as if nobody listened.
//
// The decoy has an address of this host. Where the selection is about other addresses, it has one of those: it is
// transparent, and a rule that only the probe's packets meet keeps them on lo.
type Probe struct {
	config.Shared
	ProxyUID  uint32           `json:"proxy_uid"`
	Selection config.Selection `json:"selection"`
	Cgroup    string           `json:"cgroup,omitempty"` // an excluded one, in which the probe runs
}

// Run makes every proof that this host allows. Nobody else may probe in this network namespace meanwhile.
func (p Probe) Run(ctx context.Context) ([]redirect.Check, error) {
	addresses, err := ownAddresses()
	if err != nil {
		return nil, err
	}
	injector, err := newInjector(p.Slot)
	if err != nil {
		return nil, err
	}
	defer injector.Close()
	var checks []redirect.Check
	for _, f := range []redirect.Family{redirect.IPv4, redirect.IPv6} {
		own := addresses[f]
		if len(own) == 0 {
			checks = append(checks, redirect.Check{Family: f, Direction: "outbound", OK: true, Detail: "no address of this family: nothing to capture"})
			continue
		}
		c, err := p.family(ctx, f, own, injector)
		checks = append(checks, c...)
		if err != nil {
			return checks, err
		}
	}
	return checks, nil
}

func (p Probe) family(ctx context.Context, f redirect.Family, own []ownAddress, injector *injector) ([]redirect.Check, error) {
	aside, err := probe.NewAside(f)
	if err != nil {
		return nil, err
	}
	defer aside.Close()
	// Open for all proofs: under `open` and `closed` the hooks look for it at every connect.
	out, err := probe.Borrow(f, p.Listeners.Outbound)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	in, err := probe.Borrow(f, p.Listeners.Inbound)
	if err != nil {
		return nil, err
	}
	defer in.Close()

	checks := []redirect.Check{p.routed(f)}
	checks = append(checks, p.outbound(ctx, f, false, own, out)...)
	if f == redirect.IPv4 {
		checks = append(checks, p.outbound(ctx, f, true, own, out)...)
	}
	checks = append(checks, p.proxys(ctx, f, own[0].Addr))
	for i, a := range own {
		if a.Neighbour.IsValid() {
			checks = append(checks, p.inbound(ctx, f, a, in, injector, i == 0)...)
		}
	}
	return checks, nil
}

// routed asks the kernel where it would send a captured packet to an address that is nobody's: connections to own
// addresses are delivered on this host whatever the rules say.
func (p Probe) routed(f redirect.Family) redirect.Check {
	check := redirect.Check{Family: f, Direction: "route"}
	to := probe.Nobody(f).AsSlice()
	routes, err := netlink.RouteGetWithOptions(to, &netlink.RouteGetOptions{Mark: p.Slot.Mark(config.RoleOut)})
	if err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL {
		check.OK, check.Proven, check.Detail = true, true, "a captured packet is delivered on this host"
		return check
	}
	check.Proven, check.Detail = true, fmt.Sprintf("a captured packet does not reach lo (asked for %s): %v", probe.Nobody(f), cmp.Or(err, errElsewhere))
	return check
}

var errElsewhere = errors.New("other rules send it elsewhere; see `ip rule`")

// outbound tries what the selection lets in, and each dimension by which it leaves something alone. mapped ones are made
// by IPv6 sockets.
func (p Probe) outbound(ctx context.Context, f redirect.Family, mapped bool, own []ownAddress, out *probe.Borrowed) []redirect.Check {
	isOwn := func(a netip.Addr) bool {
		return slices.ContainsFunc(own, func(o ownAddress) bool { return o.Addr == a })
	}
	base := config.Flow{UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), Cgroup: p.Cgroup}
	usable := func(w config.Flow) bool { return p.mayBe(w, base) && probe.CanListen(ctx, w.Address) }
	var err error
	if base.Address, err = probe.FreePort(ctx, own[0].Addr); err != nil {
		return []redirect.Check{{Family: f, Mapped: mapped, Direction: "outbound", Detail: err.Error()}}
	}
	witnesses := p.Selection.Witnesses(base, usable)
	if mapped { // another door to the same room: one witness is enough
		witnesses = witnesses[:min(1, len(witnesses))]
	}
	var checks []redirect.Check
	if !slices.ContainsFunc(witnesses, func(w config.Witness) bool { return w.Captured }) && p.Cgroup == "" {
		checks = append(checks, redirect.Check{Family: f, Mapped: mapped, Direction: "outbound", OK: true, Detail: "nothing that could be tried here is selected"})
	}
	for _, w := range witnesses {
		check := redirect.Check{Family: f, Mapped: mapped, Direction: "outbound", Rule: w.Rule}
		t := probe.Trial{Target: w.Address, From: probe.LoopbackOf(f), Mapped: mapped, Borrowed: out}
		if !isOwn(w.Address.Addr()) {
			t.From = own[0].Addr
			if w.Captured && !out.Free() {
				check.OK, check.Detail = true, "not tried: the proxy that runs would dial that address"
				checks = append(checks, check)
				continue
			}
		}
		if w.UID != base.UID {
			t.UID = w.UID
		}
		if w.GID != base.GID {
			t.GID = w.GID
		}
		captured, err := t.Try(ctx)
		checks = append(checks, probe.Concluded(check, w.Captured, captured, err, "an app's connection"))
	}
	return checks
}

// mayBe reports whether this process may be whom the flow is of.
func (p Probe) mayBe(w, base config.Flow) bool {
	return (w.UID == base.UID || w.UID != p.ProxyUID && probe.HasCapability(cap.SETUID)) && (w.GID == base.GID || probe.HasCapability(cap.SETGID))
}

// proxys proves that a dial of the proxy's user is left alone.
func (p Probe) proxys(ctx context.Context, f redirect.Family, own netip.Addr) redirect.Check {
	check := redirect.Check{Family: f, Direction: "proxy"}
	if !probe.HasCapability(cap.SETUID) {
		check.OK, check.Detail = true, "not tried: it takes CAP_SETUID; the proxy proves it by itself at its start"
		return check
	}
	target, err := probe.FreePort(ctx, own)
	if err != nil {
		check.Detail = err.Error()
		return check
	}
	captured, err := probe.Trial{Target: target, From: probe.LoopbackOf(f), Ports: p.DialOutbound, UID: p.ProxyUID}.Try(ctx)
	return probe.Concluded(check, false, captured, err, "the proxy's own connection")
}

// inbound tries connections by the interface that has the address; every dimension of the selection only if asked to.
func (p Probe) inbound(ctx context.Context, f redirect.Family, a ownAddress, in *probe.Borrowed, injector *injector, every bool) []redirect.Check {
	decoy, err := probe.FreePort(ctx, a.Addr)
	if err != nil {
		return []redirect.Check{{Family: f, Direction: "inbound", Interface: a.Link, Detail: err.Error()}}
	}
	base := config.Flow{Inbound: true, Address: netip.AddrPortFrom(a.Neighbour, decoy.Port()), Interface: config.InterfaceName(a.Link), Cgroup: p.Cgroup}
	witnesses := p.Selection.Witnesses(base, func(w config.Flow) bool {
		return probe.CanListen(ctx, netip.AddrPortFrom(a.Addr, w.Address.Port()))
	})
	if !every {
		witnesses = witnesses[:min(1, len(witnesses))]
	}
	var checks []redirect.Check
	for _, w := range witnesses {
		check := redirect.Check{Family: f, Direction: "inbound", Interface: a.Link, Rule: w.Rule}
		t := probe.Trial{
			Target: netip.AddrPortFrom(a.Addr, w.Address.Port()), From: w.Address.Addr(),
			Ports: p.DialInbound, Borrowed: in, Mark: p.Slot.Mark(config.RoleDial),
		}
		t.Before = func(port uint16) error { return injector.Arm(port, a.Index, a.MAC) }
		captured, err := t.Try(ctx)
		if errors.Is(err, probe.ErrSilence) {
			// Neither the proxy's listener nor the app's got it: something else drops what comes in on this port.
			check.OK, check.Detail = true, "not proven: the connection was dropped on its way in, by a packet filter or by rp_filter"
			checks = append(checks, check)
			continue
		}
		checks = append(checks, probe.Concluded(check, w.Captured, captured, err, "a connection to an app's listener"))
	}
	return checks
}
