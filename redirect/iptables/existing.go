// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/route"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Where connections are not tracked, each packet is judged by the rules as they are now. A connection that was made under
// other rules, or before there were any, would be torn in the middle: it has an exception until the next installation. None
// may be made between the listing and the new rules, so SYNs are dropped that long; they are sent again within a second.

// stateless reports whether the states have exceptions.
func stateless(want []state) bool {
	return slices.ContainsFunc(want, func(s state) bool { return slices.Contains(s.Chains, chainOld) })
}

// withRules adds rules to those of the states that have exceptions.
func withRules(want []state, rules func(state) []string) []state {
	want = slices.Clone(want)
	for i, s := range want {
		if slices.Contains(s.Chains, chainOld) {
			want[i].Rules = slices.Concat(s.Rules, rules(s))
		}
	}
	return want
}

// pause lets no app begin a connection, until the wanted states are applied to those that it returns.
func pause(ctx context.Context, policy config.Capture, want []state) (found []state, err error) {
	hold := "-p tcp " + synOnly + fmt.Sprintf(" -m owner ! --uid-owner %d -m addrtype ! --dst-type LOCAL", policy.ProxyUID)
	for _, s := range want {
		if !slices.Contains(s.Chains, chainOld) {
			continue
		}
		table := redirect.Table{
			Name: s.Table, Chains: []string{chainWait},
			Rules: []redirect.PacketRule{{Chain: chainWait, Match: hold, Target: "-j DROP", Why: "other rules are on the way; it is sent again"}},
			Jumps: []redirect.PacketRule{{Chain: "OUTPUT", Match: "-p tcp", Target: "-j " + chainWait, Why: "while the rules change"}},
		}
		if err := restore(ctx, s.Tool, transaction(state{}, wanted(table, s.Tool, nil))); err != nil {
			return nil, err
		}
	}
	if err := answered(ctx, policy.ProxyUID); err != nil {
		return nil, err
	}
	return readState(ctx)
}

// answerTime is how long a server has to answer a SYN that went out before the pause. If it answers later, the connection
// is reset where the new rules treat it otherwise.
const answerTime = 200 * time.Millisecond

// answered waits until every SYN of an app is answered that was sent once.
func answered(ctx context.Context, proxyUID uint32) error {
	ctx, stop := context.WithTimeout(ctx, answerTime)
	defer stop()
	for {
		open := false
		for _, f := range []redirect.Family{redirect.IPv4, redirect.IPv6} {
			rows, err := sockets(f)
			if err != nil {
				return err
			}
			open = open || slices.ContainsFunc(rows, func(s *netlink.Socket) bool {
				return s.State == tcpSynSent && s.Retrans == 0 && s.UID != proxyUID
			})
		}
		if !open {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(answerTime / 40):
		}
	}
}

// mostExceptions bounds them: each packet of the app passes all of them.
const mostExceptions = 1024

// connection is one as its own end sees it.
type connection struct {
	local, remote netip.AddrPort
	uid           uint32
}

// States of a TCP socket (include/net/tcp_states.h).
const (
	tcpSynSent  = 2
	tcpTimeWait = 6
	tcpClosed   = 7
	tcpListen   = 10
)

// sockets lists the TCP sockets of this network namespace; none of a family that the kernel does not have.
func sockets(f redirect.Family) ([]*netlink.Socket, error) {
	family := uint8(unix.AF_INET)
	if f == redirect.IPv6 {
		family = unix.AF_INET6
	}
	rows, err := route.List(func() ([]*netlink.Socket, error) { return netlink.SocketDiagTCP(family) })
	if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
		return nil, fmt.Errorf("list the connections that are open: %w", err)
	}
	return rows, nil
}

// connections are those of the sockets that are open or closing.
func connections(f redirect.Family) ([]connection, error) {
	rows, err := sockets(f)
	if err != nil {
		return nil, err
	}
	var list []connection
	for _, s := range rows {
		// One that waits for its SYN-ACK begins again with its next SYN, under the new rules.
		if s.State == tcpSynSent || s.State == tcpTimeWait || s.State == tcpListen || s.State == tcpClosed {
			continue
		}
		local, ok1 := netip.AddrFromSlice(s.ID.Source)
		remote, ok2 := netip.AddrFromSlice(s.ID.Destination)
		if ok1 && ok2 {
			list = append(list, connection{
				netip.AddrPortFrom(local.Unmap(), s.ID.SourcePort), netip.AddrPortFrom(remote.Unmap(), s.ID.DestinationPort), s.UID,
			})
		}
	}
	return list, nil
}

// ownAddresses are those of this network namespace.
func ownAddresses() (map[netip.Addr]bool, error) {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list own addresses: %w", err)
	}
	own := make(map[netip.Addr]bool)
	for _, a := range list {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			own[p.Addr()] = true
		}
	}
	return own, nil
}

// exceptions are the rules for connections that are under way and that the policy would now treat otherwise than they are
// treated: those that pass captured have the proxy's socket as their other end, in this very namespace.
func exceptions(policy config.Capture, f redirect.Family) ([]redirect.PacketRule, error) {
	all, err := connections(redirect.IPv4)
	if err != nil {
		return nil, err
	}
	if f == redirect.IPv6 {
		if all, err = connections(redirect.IPv6); err != nil {
			return nil, err
		}
	} else { // IPv4 by IPv6 sockets
		mapped, err := connections(redirect.IPv6)
		if err != nil {
			return nil, err
		}
		all = append(all, mapped...)
	}
	type ends struct{ local, remote netip.AddrPort }
	there := make(map[ends]bool, len(all))
	for _, c := range all {
		there[ends{c.local, c.remote}] = true
	}
	own, err := ownAddresses()
	if err != nil {
		return nil, err
	}
	var rules []redirect.PacketRule
	m := marks{policy.Slot}
	for _, c := range all {
		twin := there[ends{c.remote, c.local}]
		if c.local.Addr().Is4() != (f == redirect.IPv4) || c.uid == policy.ProxyUID || own[c.remote.Addr()] {
			continue
		}
		verdict := policy.Selection.Judge(config.Flow{Address: c.remote, UID: c.uid})
		match := fmt.Sprintf("-s %s -d %s -p tcp -m tcp --sport %d --dport %d", c.local.Addr(), c.remote.Addr(), c.local.Port(), c.remote.Port())
		switch {
		case twin && !verdict.Captured:
			rules = append(rules, redirect.PacketRule{Chain: chainOld, Match: match, Target: m.set(config.RoleOut), Why: "captured by an earlier policy"})
		case !twin && verdict.Captured:
			// An answer to a connection from outside is here too: it may be older than the mark by which it would be known.
			rules = append(rules, redirect.PacketRule{Chain: chainOld, Match: match, Target: m.set(config.RoleProxy), Why: "older than the capture"})
		}
	}
	if len(rules) > mostExceptions {
		return nil, &config.Fault{
			Err:  fmt.Errorf("IPv%d: %d connections are under way that must not be torn, which is too many for single rules", f, len(rules)),
			Hint: "load connection tracking (modprobe nf_conntrack), install the capture before the app starts, or take --backend ebpf",
			Exit: config.ExitUnavailable,
		}
	}
	return rules, nil
}
