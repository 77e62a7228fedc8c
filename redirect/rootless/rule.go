// SPDX-License-Identifier: Apache-2.0

package rootless

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/pillionproxy/pillion/redirect"
	"golang.org/x/sys/unix"
)

// Rule is one of the packet filter: as nft(8) writes it, and as the kernel reads it.
type Rule struct {
	Family redirect.Family `json:"family"`
	Chain  string          `json:"chain"`
	Text   string          `json:"text"`
	Why    string          `json:"why"`
	parts  []part
}

// part is a match or a verdict.
type part struct {
	text  string
	exprs []expr.Any
	// in are addresses that the loaded one is compared with, by a set of the rule's own.
	in     []netip.Prefix
	negate bool
}

const (
	prerouting = "prerouting"
	output     = "output"
)

// filter is a rule for what arrives, which here is all that is sent.
func filter(f redirect.Family, why string, verdict part, matches ...part) Rule {
	return newRule(f, prerouting, why, append(matches, verdict))
}

// refusal is a rule that refuses to send, with an error for the sender.
func refusal(f redirect.Family, why string, matches ...part) Rule {
	code := part{text: "reject with icmp host-unreachable", exprs: []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: 1}}}
	if f == redirect.IPv6 {
		code = part{text: "reject with icmpv6 addr-unreachable", exprs: []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: 3}}}
	}
	return newRule(f, output, why, append(matches, code))
}

func newRule(f redirect.Family, chain, why string, parts []part) Rule {
	words := make([]string, len(parts))
	for i, p := range parts {
		words[i] = p.text
	}
	return Rule{Family: f, Chain: chain, Text: strings.Join(words, " "), Why: why, parts: parts}
}

func nftName(f redirect.Family) string {
	if f == redirect.IPv6 {
		return "ip6"
	}
	return "ip"
}

func table(f redirect.Family) *nftables.Table {
	if f == redirect.IPv6 {
		return &nftables.Table{Name: "pillion", Family: nftables.TableFamilyIPv6}
	}
	return &nftables.Table{Name: "pillion", Family: nftables.TableFamilyIPv4}
}

// chains of a family's table, in the order of the rules.
func chains(f redirect.Family) []*nftables.Chain {
	return []*nftables.Chain{
		{Name: prerouting, Table: table(f), Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityMangle},
		{Name: output, Table: table(f), Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityFilter},
	}
}

// Matches. Each uses register 1 anew.

const register = 1

func protocol(name string, number byte) part {
	return part{text: "meta l4proto " + name, exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: []byte{number}},
	}}
}

func tcp() part { return protocol("tcp", unix.IPPROTO_TCP) }
func udp() part { return protocol("udp", unix.IPPROTO_UDP) }

// notSYN matches every packet of TCP but the first of a connection (RFC 9293 §3.1: the flags are in byte 13).
func notSYN() part {
	const fin, syn, rst, ack = 1, 2, 4, 16
	return part{text: "tcp flags & (fin | syn | rst | ack) != syn", exprs: []expr.Any{
		&expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: 1, Mask: []byte{fin | syn | rst | ack}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: register, Data: []byte{syn}},
	}}
}

// MarkProxy is the packet mark of what the proxy sends to listeners of the command.
const MarkProxy = 1

// fromProxy matches it.
func fromProxy() part {
	return part{text: fmt.Sprintf("meta mark %d", MarkProxy), exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: register},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: binary.NativeEndian.AppendUint32(nil, MarkProxy)},
	}}
}

// hasSocket matches what a socket of this namespace would receive.
func hasSocket() part {
	return part{text: "socket transparent { 0, 1 }", exprs: []expr.Any{&expr.Socket{Key: expr.SocketKeyTransparent, Register: register}}}
}

// echo matches an echo request (RFC 792, RFC 4443 §4.1).
func echo(f redirect.Family) part {
	p, kind := protocol("icmp", unix.IPPROTO_ICMP), byte(8)
	p.text = "icmp type echo-request"
	if f == redirect.IPv6 {
		p, kind = protocol("ipv6-icmp", unix.IPPROTO_ICMPV6), 128
		p.text = "icmpv6 type echo-request"
	}
	p.exprs = append(p.exprs,
		&expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: []byte{kind}})
	return p
}

func to(f redirect.Family, list []netip.Prefix) part      { return address(f, "daddr", list, false) }
func notTo(f redirect.Family, list []netip.Prefix) part   { return address(f, "daddr", list, true) }
func notFrom(f redirect.Family, list []netip.Prefix) part { return address(f, "saddr", list, true) }

// address compares one of the two addresses of a packet with a list (RFC 791 §3.1, RFC 8200 §3).
func address(f redirect.Family, which string, list []netip.Prefix, negate bool) part {
	words := make([]string, len(list))
	for i, p := range list {
		words[i] = p.String()
		if p.IsSingleIP() {
			words[i] = p.Addr().String()
		}
	}
	not := ""
	if negate {
		not = "!= "
	}
	load := &expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4}
	if f == redirect.IPv6 {
		load.Offset, load.Len = 8, 16
	}
	if which == "daddr" {
		load.Offset += load.Len
	}
	return part{
		text:  fmt.Sprintf("%s %s %s{ %s }", nftName(f), which, not, strings.Join(words, ", ")),
		exprs: []expr.Any{load}, in: list, negate: negate,
	}
}

// Verdicts.

func accept() part { return verdict("accept", expr.VerdictAccept) }
func drop() part   { return verdict("drop", expr.VerdictDrop) }

func verdict(text string, kind expr.VerdictKind) part {
	return part{text: text, exprs: []expr.Any{&expr.Verdict{Kind: kind}}}
}

// tproxy gives the packet to the socket that listens on a port of the loopback address.
func tproxy(f redirect.Family, port uint16) part {
	loopback, kernelFamily := netip.AddrFrom4([4]byte{127, 0, 0, 1}), byte(unix.NFPROTO_IPV4)
	if f == redirect.IPv6 {
		loopback, kernelFamily = netip.IPv6Loopback(), unix.NFPROTO_IPV6
	}
	return part{text: fmt.Sprintf("tproxy to %s accept", netip.AddrPortFrom(loopback, port)), exprs: []expr.Any{
		&expr.Immediate{Register: 1, Data: loopback.AsSlice()},
		&expr.Immediate{Register: 2, Data: binary.BigEndian.AppendUint16(nil, port)},
		&expr.TProxy{Family: kernelFamily, TableFamily: kernelFamily, RegAddr: 1, RegPort: 2},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}}
}

// intervals are the elements of a set of prefixes: the start of each, and the address behind it.
func intervals(list []netip.Prefix) []nftables.SetElement {
	var elements []nftables.SetElement
	for _, p := range list {
		elements = append(elements, nftables.SetElement{Key: p.Masked().Addr().AsSlice()})
		if end := behind(p); end.IsValid() {
			elements = append(elements, nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
		}
	}
	return elements
}

// behind is the first address behind a prefix; invalid behind the last of all.
func behind(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	last, _ := netip.AddrFromSlice(b)
	return last.Next()
}
