// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"fmt"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
)

// The backend redirect: destination NAT to the proxy's listeners, which asks for the original destination
// (SO_ORIGINAL_DST). It is for a proxy without any capability: its own connections are known by their user alone.
func redirectTables(policy config.Capture, tool Tool) []redirect.Table {
	tables := []redirect.Table{redirectNAT(policy, tool)}
	if t := redirectFilter(policy, tool); len(t.Jumps) > 0 {
		tables = append(tables, t)
	}
	return tables
}

func redirectNAT(policy config.Capture, tool Tool) redirect.Table {
	b := newBuilder(tool, "nat")

	b.chain(chainOut)
	b.rule(proxys(policy), "-j RETURN", "the proxy's own connections")
	b.rule("-m addrtype --dst-type LOCAL", "-j RETURN", "to this host itself")
	b.selectOutbound(policy.Selection)
	b.counted("-p tcp", fmt.Sprintf("-j REDIRECT --to-ports %d", policy.Listeners.Outbound), "out_captured", "to the proxy")

	b.chain(chainIn)
	b.rule("-m addrtype ! --dst-type LOCAL", "-j RETURN", "for another host")
	b.rule("-p tcp -m multiport --dports "+proxyPorts(policy), "-j RETURN", "for the proxy itself")
	b.selectInbound(policy.Selection)
	b.counted("-p tcp -m socket --nowildcard", fmt.Sprintf("-j REDIRECT --to-ports %d", policy.Listeners.Inbound), "in_captured", "for a listener of the app: to the proxy")

	// SYNs alone: a connection that is older than its tracking is new to it in the middle (nf_conntrack_tcp_loose).
	b.jump("OUTPUT", "-p tcp "+synOnly, chainOut, "the app's connections")
	b.jump("PREROUTING", "! -i lo -p tcp "+synOnly, chainIn, "connections to the app's listeners")
	return b.table
}

// redirectFilter holds connections back while no proxy listens: else the kernel refuses them (closed).
func redirectFilter(policy config.Capture, tool Tool) redirect.Table {
	b := newBuilder(tool, "filter")
	for _, d := range []struct {
		mode  config.FailureMode
		port  uint16
		chain string
		why   string
	}{
		{policy.OnProxyDown, policy.Listeners.Outbound, chainHold, "outbound"},
		{policy.OnProxyDownInbound, policy.Listeners.Inbound, chainHoldIn, "inbound"},
	} {
		if d.mode != config.Hold {
			continue
		}
		b.chain(d.chain)
		b.rule("-p tcp -m socket --nowildcard", "-j RETURN", "the proxy listens")
		b.rule("-m conntrack --ctstate DNAT", "-j DROP", "it does not: the SYN is sent again until it does")
		b.jump("INPUT", fmt.Sprintf("-p tcp -m tcp --dport %d --tcp-flags FIN,SYN,RST,ACK SYN", d.port), d.chain, "a new connection to the proxy, "+d.why)
	}
	return b.table
}
