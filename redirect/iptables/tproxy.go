// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"fmt"
	"slices"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
)

// The backend tproxy. Roles, marks, rules and routes are those of ebpf (config.Role), but a packet filter marks packets
// where ebpf marks sockets:
//
//   - The app's packets to be captured carry RoleOut. Which packets are those of a captured connection is decided at its
//     SYN; where connections are tracked that is written into the connection's mark, else every packet is judged anew by
//     the same rules.
//   - What answers a connection from outside is known by RoleProxy: every packet that comes in carries it, and whatever
//     answers takes it over (tcp_fwmark_accept, fwmark_reflect). So an app's answers are never taken for its own
//     connections, and the proxy's SYN-ACKs never for the app's.
//   - A socket that was closed has no owner any more, though its last packets are still under way: the proxy's are known
//     by their source port.

const (
	synOnly = "-m tcp --tcp-flags FIN,SYN,RST,ACK SYN"
	notSyn  = "-m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN"
	notRst  = "-m tcp ! --tcp-flags RST RST"
	// bareAck may be the last packet of a handshake that was answered by a SYN cookie: there is no socket yet, and only the
	// listener that sent the cookie can tell. One with data that nobody has a socket for is pushed, and refused.
	bareAck    = "-m tcp --tcp-flags FIN,SYN,RST,PSH,ACK ACK"
	notBareAck = "-m tcp ! --tcp-flags FIN,SYN,RST,PSH,ACK ACK"
)

// sysctls are all that the backend may need.
var sysctls = []redirect.Sysctl{
	{Name: "net.ipv4.tcp_fwmark_accept", Value: "1", Why: "accepted sockets take the mark of their SYN (both families)"},
	{Name: "net.ipv4.fwmark_reflect", Value: "1", Why: "resets take the mark of what they answer"},
	{Name: sysctlReflect6, Value: "1", Why: "the same, IPv6"},
	{Name: sysctlLiberal, Value: "1", Why: "a packet out of its window still belongs to its connection"},
}

const (
	sysctlReflect6 = "net.ipv6.fwmark_reflect"
	sysctlLiberal  = "net.netfilter.nf_conntrack_tcp_be_liberal"
)

func sysctlsFor(host redirect.Host, tracked bool) (list []redirect.Sysctl) {
	for _, s := range sysctls {
		if (host.IPv6 || s.Name != sysctlReflect6) && (tracked || s.Name != sysctlLiberal) {
			list = append(list, s)
		}
	}
	return list
}

// foundSysctls are the values now of those that a plan sets, in the order of sysctls; "" of the others.
func foundSysctls(plan redirect.Plan) []string {
	found := redirect.ReadSysctls(sysctls)
	for i, s := range sysctls {
		if !slices.Contains(plan.Sysctls, s) {
			found[i] = ""
		}
	}
	return found
}

// marks are the roles as packet filters write them.
type marks struct{ slot config.Slot }

func (m marks) is(r config.Role) string {
	return fmt.Sprintf("-m mark --mark %#x/%#x", m.slot.Mark(r), m.slot.Mask())
}

func (m marks) isNot(r config.Role) string {
	return fmt.Sprintf("-m mark ! --mark %#x/%#x", m.slot.Mark(r), m.slot.Mask())
}

func (m marks) set(r config.Role) string {
	return fmt.Sprintf("-j MARK --set-xmark %#x/%#x", m.slot.Mark(r), m.slot.Mask())
}

func (m marks) keep(r config.Role) string {
	return fmt.Sprintf("-j CONNMARK --set-xmark %#x/%#x", m.slot.Mark(r), m.slot.Mask())
}

func tproxyTables(policy config.Capture, tool Tool, tracked bool) []redirect.Table {
	return []redirect.Table{tproxyMangle(policy, tool, tracked), tproxyFilter(policy, tool)}
}

func tproxyMangle(policy config.Capture, tool Tool, tracked bool) redirect.Table {
	m := marks{policy.Slot}
	b := newBuilder(tool, "mangle")

	b.chain(chainOut)
	// A SYN is no answer, whatever mark an app gave it.
	b.rule("-p tcp "+notSyn+" "+m.is(config.RoleDialReply), "-j RETURN", "the app's answers to the proxy's dials")
	b.rule("-p tcp "+notSyn+" "+m.is(config.RoleProxy), "-j RETURN", "answers to connections from outside")
	// What the kernel answers for an app's socket that is closed, or in TIME_WAIT, has the mark of what it answers. It is
	// known by its source: the proxy answers the app from another host's address.
	b.rule("-p tcp "+notSyn+" "+m.is(config.RoleReply)+" -m addrtype --src-type LOCAL", m.set(config.RoleOut), "the app's kernel answers the proxy")
	b.rule("-p tcp "+notSyn+" "+m.is(config.RoleOut), "-j RETURN", "it does, or a reset on the way to the app")
	b.rule("-p tcp "+notSyn+" "+m.is(config.RoleReply), "-j RETURN", "the proxy's answers to the app")
	owner := fmt.Sprintf("-m owner --uid-owner %d", policy.ProxyUID)
	b.rule(fmt.Sprintf("-p tcp %s -m tcp --sport %s", owner, colon(policy.DialInbound)), m.set(config.RoleDial), "the proxy's dials in a client's name")
	b.rule(proxys(policy), "-j RETURN", "the proxy's own connections")
	if tracked {
		b.rule(fmt.Sprintf("-p tcp "+notSyn+" -m conntrack --ctdir ORIGINAL -m connmark --mark %#x/%#x", m.slot.Mark(config.RoleOut), m.slot.Mask()),
			m.set(config.RoleOut), "of a captured connection")
		b.rule("-p tcp "+notSyn, "-j RETURN", "of any other")
		b.rule(fmt.Sprintf("-m connmark ! --mark 0x0/%#x", m.slot.Mask()), m.keep(0), "what an earlier connection of the same ports left")
	} else {
		for _, r := range []config.PortRange{policy.DialOutbound, policy.DialInbound} {
			b.rule("-p tcp -m owner ! --socket-exists -m tcp --sport "+colon(r), "-j RETURN", "the same, when its socket is closed already")
		}
		b.rule("-p tcp "+notSyn, "-j "+chainOld, "made under other rules?")
		b.rule("-p tcp "+notSyn+" "+m.isNot(0), "-j RETURN", "it was, and goes on as it began")
	}
	b.rule("-m addrtype --dst-type LOCAL", "-j RETURN", "to this host itself")
	b.selectOutbound(policy.Selection)
	if tracked {
		b.counted("", m.keep(config.RoleOut), "out_captured", "the rest of the connection too")
		b.rule("", m.set(config.RoleOut), "captured: routed to lo")
	} else {
		b.counted("-p tcp "+synOnly, m.set(config.RoleOut), "out_captured", "captured: routed to lo")
		b.rule("", m.set(config.RoleOut), "the rest of the connection")
		b.chain(chainOld) // filled by Install
	}

	b.chain(chainLo)
	b.rule(m.is(config.RoleDial), m.set(config.RoleDialReply), "what the app answers to the proxy's dial comes back")
	b.rule(m.isNot(config.RoleOut), "-j RETURN", "not the app's to the proxy")
	on := fmt.Sprintf("-j TPROXY --on-port %%d --on-ip %s --tproxy-mark %%#x/%#x", tool.loopback(), m.slot.Mask())
	b.rule("-p tcp "+synOnly, fmt.Sprintf(on, policy.Listeners.Outbound, m.slot.Mark(config.RoleReply)), "to the proxy; dropped while none listens, and sent again")
	b.rule("-p tcp -m socket --transparent", m.set(config.RoleReply), "of a connection that the proxy has")
	b.rule(m.is(config.RoleReply), "-j RETURN", "so it is for the proxy")
	b.rule("-p tcp "+bareAck, fmt.Sprintf(on, policy.Listeners.Outbound, m.slot.Mark(config.RoleReply)), "the last of a handshake by SYN cookie; else the listener resets it")

	b.chain(chainIn)
	b.rule(m.isNot(0), "-j RETURN", "marked by somebody else")
	b.rule("", m.set(config.RoleProxy), "what answers is an answer, no connection of the app's")
	// Never two matches of tcp in one rule: iptables-nft 1.8.9 lists them as one.
	b.rule("-p tcp "+synOnly, "-g "+chainNew, "a new connection")
	b.rule("-p tcp -m socket", "-j RETURN", "of a connection that is there")
	b.rule("-p tcp "+notBareAck, "-j RETURN", "of none")
	b.rule("", "-g "+chainNew, "of none, or the last of a handshake by SYN cookie")

	b.chain(chainNew)
	b.rule("-m addrtype ! --dst-type LOCAL", "-j RETURN", "for another host")
	b.rule("-p tcp -m multiport --dports "+proxyPorts(policy), "-j RETURN", "for the proxy itself")
	b.selectInbound(policy.Selection)
	toProxy := fmt.Sprintf(on, policy.Listeners.Inbound, m.slot.Mark(config.RoleProxy))
	b.counted("-p tcp "+synOnly+" -m socket --nowildcard", toProxy, "in_captured", "for a listener of the app: to the proxy")
	b.rule("-p tcp -m socket --nowildcard", toProxy, "the last of a handshake by SYN cookie; else the listener resets it")

	b.jump("OUTPUT", "-p tcp", chainOut, "the app's connections")
	b.jump("PREROUTING", "-i lo -p tcp", chainLo, "the app's packets to the proxy")
	b.jump("PREROUTING", "! -i lo -p tcp", chainIn, "connections to the app's listeners")
	return b.table
}

// tproxyFilter answers what the proxy's end of a connection is gone for: the app learns at once.
func tproxyFilter(policy config.Capture, tool Tool) redirect.Table {
	b := newBuilder(tool, "filter")
	b.chain(chainReset)
	// The reset itself comes by here, with the mark of what it answers: REJECT would swallow it.
	b.rule("-p tcp "+notRst, "-j REJECT --reject-with tcp-reset", "a captured connection that the proxy does not have")
	b.jump("INPUT", "-i lo -p tcp "+marks{policy.Slot}.is(config.RoleOut), chainReset, "the app writes, and the proxy is gone")
	return b.table
}
