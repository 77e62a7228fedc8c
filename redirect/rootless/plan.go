// SPDX-License-Identifier: Apache-2.0

package rootless

import (
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"

	"github.com/pillionproxy/pillion/redirect"
)

// Name of the backend.
const Name = "rootless"

// Plan is everything that is done in the namespace of the command, in this order.
type Plan struct {
	Backend   string            `json:"backend"`
	Sysctls   []redirect.Sysctl `json:"sysctls"`
	Addresses []netip.Addr      `json:"addresses"` // added to lo
	Routes    []Destination     `json:"routes"`    // local, through lo
	Ports     Ports             `json:"ports"`     // to which the rules lead
	Rules     []Rule            `json:"rules"`     // of the table "pillion" of each family
}

// Ports are the listeners to which the packet filter leads, at 127.0.0.1 and ::1.
type Ports struct {
	TCP uint16 `json:"tcp"`
	UDP uint16 `json:"udp"`
}

// MakePlan makes the plan for a host.
func MakePlan(h Host, p Ports) Plan {
	plan := Plan{Backend: Name, Sysctls: slices.Clone(sysctls), Addresses: h.Addresses, Routes: h.Routes, Ports: p}
	if h.NoIPv6 {
		plan.Sysctls = append(plan.Sysctls, redirect.Sysctl{Name: "net.ipv6.conf.all.disable_ipv6", Value: "1", Why: "this host has no IPv6"})
	}
	for _, f := range []redirect.Family{redirect.IPv4, redirect.IPv6} {
		plan.Rules = append(plan.Rules, rules(f, h.Addresses, p)...)
	}
	return plan
}

// sysctls are those of the namespace.
var sysctls = []redirect.Sysctl{
	{Name: "net.ipv4.tcp_congestion_control", Value: "reno", Why: "what paces itself, as BBR does, is slow where there is no network"},
}

// rules are those of a family.
//
// A listener or another socket of the command's own is met at its own addresses alone: elsewhere, one that is bound to every
// address would be taken for the server that was meant.
func rules(f redirect.Family, addresses []netip.Addr, p Ports) []Rule {
	own := ownAddresses(f, addresses)
	return []Rule{
		filter(f, "to a listener of the command's own, from the proxy", accept(), fromProxy()),
		filter(f, "packets of connections that there are", accept(), tcp(), notSYN()),
		filter(f, "to a listener of the command's own", accept(), tcp(), to(f, own), hasSocket()),
		filter(f, "every other connection goes to the proxy", tproxy(f, p.TCP), tcp()),
		filter(f, "datagrams to a socket of the command's own", accept(), udp(), to(f, own), hasSocket()),
		filter(f, "an answer for which nobody waits any more", drop(), udp(), notFrom(f, own)),
		filter(f, "multicast and broadcast have nobody to go to", drop(), udp(), to(f, manyAddresses(f))),
		filter(f, "every other datagram goes to the proxy", tproxy(f, p.UDP), udp()),
		refusal(f, "ping is not carried: it would be answered here, in the name of the other", echo(f), notTo(f, own)),
	}
}

// ownAddresses are those at which the command itself is met.
func ownAddresses(f redirect.Family, addresses []netip.Addr) []netip.Prefix {
	list := []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	if f == redirect.IPv6 {
		list = []netip.Prefix{netip.MustParsePrefix("::1/128")}
	}
	for _, a := range addresses {
		if family(a) == f {
			list = append(list, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return list
}

func manyAddresses(f redirect.Family) []netip.Prefix {
	if f == redirect.IPv6 {
		return []netip.Prefix{netip.MustParsePrefix("ff00::/8")}
	}
	return []netip.Prefix{netip.MustParsePrefix("224.0.0.0/3")}
}

// WriteText prints the plan as the commands that would do the same, each with its reason.
func (p Plan) WriteText(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "# backend %s: in a user and a network namespace of the command's own (unshare --user --net)\n", p.Backend)
	for _, s := range p.Sysctls {
		fmt.Fprintf(&b, "# %s\nsysctl -w %s=%s\n", s.Why, s.Name, s.Value)
	}
	fmt.Fprintf(&b, "\nip link set lo up\n\n# the host's addresses, which the command goes on having\n")
	for _, a := range p.Addresses {
		fmt.Fprintf(&b, "ip address add %s/%d dev lo\n", a, a.BitLen())
	}
	fmt.Fprintf(&b, "\n# where the host has a route to is here, and the command's own address is as it would be\n")
	for _, r := range p.Routes {
		flag := ""
		if !r.Source.Is4() {
			flag = "-6 "
		}
		fmt.Fprintf(&b, "ip %sroute add local %s dev lo src %s table main\n", flag, r.To, r.Source)
	}
	for _, f := range []redirect.Family{redirect.IPv4, redirect.IPv6} {
		fmt.Fprintf(&b, "\nnft add table %s pillion\n", nftName(f))
		for _, c := range chains(f) {
			fmt.Fprintf(&b, "nft 'add chain %s pillion %s { type filter hook %s priority %d; }'\n", nftName(f), c.Name, c.Name, *c.Priority)
		}
		for _, r := range p.Rules {
			if r.Family == f {
				fmt.Fprintf(&b, "# %s\nnft 'add rule %s pillion %s %s'\n", r.Why, nftName(f), r.Chain, r.Text)
			}
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}
