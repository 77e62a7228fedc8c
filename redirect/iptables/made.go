// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/pillionproxy/pillion/redirect"
	"golang.org/x/sys/unix"
)

// The programs of iptables-nft make a table, or a chain of the kernel's hooks, when a rule needs it, and leave it when the
// rule is gone. What we made them make is told in our note, and deleted with our rules if it is empty then.

var nftFamilies = map[redirect.Family]struct {
	name   string
	number nftables.TableFamily
}{
	redirect.IPv4: {"ip", nftables.TableFamilyIPv4},
	redirect.IPv6: {"ip6", nftables.TableFamilyIPv6},
}

// willMake says which objects of nf_tables the wanted states bring into being, beside those that are there.
func willMake(want []state, there []string) (made []string) {
	for _, s := range want {
		if s.Tool.Flavour != NFT {
			continue
		}
		table := nftFamilies[s.Tool.Family].name + "." + s.Table
		if !slices.Contains(there, table) {
			made = append(made, table)
			continue
		}
		for _, j := range s.Jumps {
			if chain := table + "." + chainOf(j); !slices.Contains(there, chain) && !slices.Contains(made, chain) {
				made = append(made, chain)
			}
		}
	}
	return made
}

// objects are the names of the tables and chains of nf_tables that there are.
func objects() ([]string, error) {
	conn, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("ask for the tables of nf_tables: %w", err)
	}
	var names []string
	for _, f := range nftFamilies {
		tables, err := conn.ListTablesOfFamily(f.number)
		if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list the tables of nf_tables: %w", err)
		}
		for _, t := range tables {
			names = append(names, f.name+"."+t.Name)
		}
		chains, err := conn.ListChainsOfTableFamily(f.number)
		if err != nil {
			return nil, fmt.Errorf("list the chains of nf_tables: %w", err)
		}
		for _, c := range chains {
			names = append(names, f.name+"."+c.Table.Name+"."+c.Name)
		}
	}
	return names, nil
}

// unmake deletes what a note says we made, as far as it is empty: a table whose chains have no rules and accept, or such a
// chain.
func unmake(made []string) error {
	if len(made) == 0 {
		return nil
	}
	there, err := objects()
	if err != nil {
		return err
	}
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("delete the empty tables of nf_tables: %w", err)
	}
	for _, f := range nftFamilies {
		chains, err := conn.ListChainsOfTableFamily(f.number)
		if err != nil {
			continue // no such family, or none of its tables
		}
		used := make(map[string]bool) // tables
		for _, c := range chains {
			name := f.name + "." + c.Table.Name
			rules, err := conn.GetRules(c.Table, c)
			if err != nil {
				return fmt.Errorf("list the rules of %s.%s: %w", name, c.Name, err)
			}
			empty := len(rules) == 0 && c.Hooknum != nil && (c.Policy == nil || *c.Policy == nftables.ChainPolicyAccept)
			used[name] = used[name] || !empty
			if empty && slices.Contains(made, name+"."+c.Name) {
				conn.DelChain(c)
			}
		}
		for _, name := range made {
			family, table, _ := strings.Cut(name, ".")
			if family == f.name && !strings.Contains(table, ".") && !used[name] && slices.Contains(there, name) {
				conn.DelTable(&nftables.Table{Name: table, Family: f.number})
			}
		}
	}
	if err := conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("delete the empty tables of nf_tables: %w", err)
	}
	return nil
}
