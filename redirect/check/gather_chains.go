// SPDX-License-Identifier: Apache-2.0

package check

import (
	"bytes"
	"context"
	"os"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// gatherChains lists the chains in the host's packet filters, and counts the rules of each iptables flavour. It adds no
// table by asking: nftables is asked by netlink, and of iptables-legacy only tables that are there are read.
func gatherChains(ctx context.Context, run Runner, lab *Lab) ForeignChains {
	var all []Chain
	var f ForeignChains
	chains, rules, err := nftChains()
	if err != nil {
		f.Unknown = missingRight(err, "CAP_NET_ADMIN")
	}
	all = append(all, chains...)
	for i := range lab.Tables {
		t := &lab.Tables[i]
		if t.Flavour == "nft" {
			t.Rules = rules[familyName(t.Family)]
			continue
		}
		chains, n, err := legacyChains(ctx, run, *t)
		if err != nil && f.Unknown == "" {
			f.Unknown = missingRight(err, "root, for those of "+t.Program)
		}
		t.Rules, all = n, append(all, chains...)
	}
	for _, c := range all {
		if meshOf(c) != "" {
			f.Found = append(f.Found, c)
		}
	}
	return f
}

func familyName(family int) string {
	if family == 6 {
		return "ip6"
	}
	return "ip"
}

// legacyChains reads the tables of iptables-legacy that exist: naming another would make it.
func legacyChains(ctx context.Context, run Runner, t Tables) (chains []Chain, rules int, err error) {
	list := map[int]string{4: "/proc/thread-self/net/ip_tables_names", 6: "/proc/thread-self/net/ip6_tables_names"}[t.Family]
	b, err := os.ReadFile(list)
	if os.IsNotExist(err) {
		return nil, 0, nil // the kernel has no such tables
	}
	if err != nil {
		return nil, 0, err
	}
	for _, table := range strings.Fields(string(b)) {
		out, err := run(ctx, lockFree, lookPath(t.Program+"-save"), "-t", table)
		if err != nil {
			return chains, rules, err
		}
		for line := range strings.Lines(out) {
			switch name, _, _ := strings.Cut(strings.TrimSpace(line), " "); {
			case strings.HasPrefix(name, ":"):
				chains = append(chains, Chain{"legacy", familyName(t.Family), table, name[1:]})
			case name == "-A":
				rules++
			}
		}
	}
	return chains, rules, nil
}

// Messages and attributes of nf_tables (linux/netfilter/nf_tables.h).
const (
	nftSubsystem    = 10
	nftNewChain     = 3
	nftGetChain     = 4
	nftNewRule      = 6
	nftGetRule      = 7
	nftaChainTable  = 1
	nftaChainName   = 3
	nfprotoInet     = 1
	nfprotoIPv4     = 2
	nfprotoIPv6     = 10
	nfgenmsgVersion = 0
)

// nftChains lists the chains of nftables, those of iptables-nft among them, and counts the rules of each family.
func nftChains() (chains []Chain, rules map[string]int, err error) {
	rows, err := nftDump(nftGetChain, nftNewChain)
	if err != nil {
		return nil, nil, err
	}
	for _, b := range rows {
		c := Chain{Flavour: "nft", Family: nftFamily(b)}
		attrs, err := nl.ParseRouteAttr(b[nl.SizeofNfgenmsg:])
		if err != nil {
			return nil, nil, err
		}
		for _, a := range attrs {
			switch a.Attr.Type {
			case nftaChainTable:
				c.Table = text(a.Value)
			case nftaChainName:
				c.Name = text(a.Value)
			}
		}
		chains = append(chains, c)
	}
	rows, err = nftDump(nftGetRule, nftNewRule)
	rules = map[string]int{}
	for _, b := range rows {
		rules[nftFamily(b)]++
	}
	return chains, rules, err
}

func nftDump(get, answer int) ([][]byte, error) {
	req := nl.NewNetlinkRequest(nftSubsystem<<8|get, unix.NLM_F_DUMP)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_UNSPEC, Version: nfgenmsgVersion})
	return req.Execute(unix.NETLINK_NETFILTER, uint16(nftSubsystem<<8|answer))
}

func nftFamily(message []byte) string {
	switch message[0] {
	case nfprotoIPv4:
		return "ip"
	case nfprotoIPv6:
		return "ip6"
	case nfprotoInet:
		return "inet"
	default:
		return "other"
	}
}

func text(b []byte) string { return string(bytes.TrimRight(b, "\x00")) }
