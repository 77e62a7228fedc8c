// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/probe"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// Prove shows by real connections that the capture of a policy takes what it should and leaves alone what it should. The
// caller holds the redirect.Lock.
//
// Connections to addresses of this host are never captured here, so the decoy has an address that is nobody's; a rule for
// the probe's packets alone keeps on lo what was not captured. Connections from outside come out of a network namespace
// that is made for them.
func Prove(ctx context.Context, backend string, policy config.Capture) ([]redirect.Check, error) {
	host, err := redirect.ReadHost(0)
	if err != nil {
		return nil, err
	}
	p := prover{backend: backend, policy: policy}
	if p.own, err = sources(); err != nil {
		return nil, err
	}
	families := []redirect.Family{redirect.IPv4}
	if host.IPv6 {
		families = append(families, redirect.IPv6)
	}
	var checks []redirect.Check
	for _, f := range families {
		if _, ok := p.own[f]; !ok {
			checks = append(checks, redirect.Check{Family: f, Direction: "outbound", OK: true, Detail: "no address of this family: nothing to capture"})
			continue
		}
		c, err := p.family(ctx, f)
		checks = append(checks, c...)
		if err != nil {
			return checks, err
		}
	}
	return checks, nil
}

type prover struct {
	backend string
	policy  config.Capture
	own     map[redirect.Family]netip.Addr // to connect from
}

// sources are an address of this host for each family that has one beside loopback.
func sources() (map[redirect.Family]netip.Addr, error) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list own addresses: %w", err)
	}
	own := make(map[redirect.Family]netip.Addr)
	for _, a := range all {
		p, err := netip.ParsePrefix(a.String())
		if err != nil || !p.Addr().IsGlobalUnicast() {
			continue
		}
		f := redirect.IPv4
		if p.Addr().Is6() {
			f = redirect.IPv6
		}
		if _, ok := own[f]; !ok {
			own[f] = p.Addr()
		}
	}
	return own, nil
}

func (p prover) family(ctx context.Context, f redirect.Family) ([]redirect.Check, error) {
	aside, err := probe.NewAside(f)
	if err != nil {
		return nil, err
	}
	defer aside.Close()
	out, err := probe.Borrow(f, p.policy.Listeners.Outbound)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	in, err := p.borrowInbound(f)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	checks := p.outbound(ctx, f, false, out)
	if f == redirect.IPv4 {
		checks = append(checks, p.outbound(ctx, f, true, out)...)
	}
	checks = append(checks, p.proxys(ctx, f))
	return append(checks, p.inbound(ctx, f, in)...), nil
}

// borrowInbound takes the place of the proxy's inbound listener. REDIRECT leads to the address of the interface.
func (p prover) borrowInbound(f redirect.Family) (*probe.Borrowed, error) {
	if p.backend == Redirect {
		return probe.BorrowAny(f, p.policy.Listeners.Inbound)
	}
	return probe.Borrow(f, p.policy.Listeners.Inbound)
}

func (p prover) outbound(ctx context.Context, f redirect.Family, mapped bool, out *probe.Borrowed) []redirect.Check {
	base := config.Flow{UID: uint32(os.Getuid()), GID: uint32(os.Getgid())}
	check := redirect.Check{Family: f, Mapped: mapped, Direction: "outbound"}
	nobody := probe.Nobody(f)
	decoy, err := probe.FreePort(ctx, nobody)
	if err != nil {
		check.Detail = err.Error()
		return []redirect.Check{check}
	}
	base.Address = decoy
	witnesses := p.policy.Selection.Witnesses(base, func(w config.Flow) bool {
		mayBe := (w.UID == base.UID || w.UID != p.policy.ProxyUID && probe.HasCapability(cap.SETUID)) && (w.GID == base.GID || probe.HasCapability(cap.SETGID))
		return mayBe && probe.CanListen(ctx, w.Address)
	})
	if mapped {
		witnesses = witnesses[:min(1, len(witnesses))]
	}
	if len(witnesses) == 0 || !witnesses[0].Captured {
		check.OK, check.Detail = true, "nothing that could be tried here is selected"
		return []redirect.Check{check}
	}
	var checks []redirect.Check
	for _, w := range witnesses {
		check.Rule = w.Rule
		t := probe.Trial{Target: w.Address, From: p.own[f], Mapped: mapped, Borrowed: out, ByHandshake: true}
		if w.Captured && !out.Free() && w.Address.Addr() != nobody {
			skipped := check
			skipped.OK, skipped.Detail = true, "not tried: the proxy that runs would dial that address"
			checks = append(checks, skipped)
			continue
		}
		if w.UID != base.UID {
			t.UID = w.UID
		}
		if w.GID != base.GID {
			t.GID = w.GID
		}
		captured, err := p.try(ctx, t)
		checks = append(checks, probe.Concluded(check, w.Captured, captured, err, "an app's connection"))
	}
	return checks
}

// try makes the connection, with redirect a second time if nobody got it: NAT takes another source port where a connection
// from the same one is remembered to the proxy's port, and the borrowed listener does not know it.
func (p prover) try(ctx context.Context, t probe.Trial) (captured bool, err error) {
	captured, err = t.Try(ctx)
	if p.backend == Redirect && errors.Is(err, probe.ErrSilence) {
		captured, err = t.Try(ctx)
	}
	return captured, err
}

func (p prover) proxys(ctx context.Context, f redirect.Family) redirect.Check {
	check := redirect.Check{Family: f, Direction: "proxy"}
	if !probe.HasCapability(cap.SETUID) {
		check.OK, check.Detail = true, "not tried: it takes CAP_SETUID"
		return check
	}
	decoy, err := probe.FreePort(ctx, probe.Nobody(f))
	if err != nil {
		check.Detail = err.Error()
		return check
	}
	captured, err := probe.Trial{Target: decoy, From: p.own[f], Ports: p.policy.DialOutbound, UID: p.policy.ProxyUID, ByHandshake: true}.Try(ctx)
	return probe.Concluded(check, false, captured, err, "the proxy's own connection")
}

func (p prover) inbound(ctx context.Context, f redirect.Family, in *probe.Borrowed) []redirect.Check {
	check := redirect.Check{Family: f, Direction: "inbound", Interface: outsideLink}
	out, err := newOutside(f)
	if errors.Is(err, errNoOutside) {
		check.OK, check.Detail = true, "not tried: a network namespace to connect from takes CAP_SYS_ADMIN"
		return []redirect.Check{check}
	}
	if err != nil {
		check.Detail = err.Error()
		return []redirect.Check{check}
	}
	defer out.Close()
	decoy, err := probe.FreePort(ctx, out.inside)
	if err != nil {
		check.Detail = err.Error()
		return []redirect.Check{check}
	}
	base := config.Flow{Inbound: true, Address: netip.AddrPortFrom(out.outside, decoy.Port()), Interface: outsideLink}
	var checks []redirect.Check
	for _, w := range p.policy.Selection.Witnesses(base, func(w config.Flow) bool {
		return w.Address.Addr() == out.outside && probe.CanListen(ctx, netip.AddrPortFrom(out.inside, w.Address.Port()))
	}) {
		check.Rule = w.Rule
		t := probe.Trial{
			Target: netip.AddrPortFrom(out.inside, w.Address.Port()), From: w.Address.Addr(),
			Borrowed: in, Namespace: out.namespace, ByHandshake: true,
		}
		captured, err := p.try(ctx, t)
		checks = append(checks, probe.Concluded(check, w.Captured, captured, err, "a connection to an app's listener"))
	}
	if len(checks) == 0 {
		check.OK, check.Detail = true, fmt.Sprintf("nothing from %s is selected", out.outside)
		checks = append(checks, check)
	}
	return checks
}
