// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/pillionproxy/pillion/redirect"
)

// state is what there is of ours in one table: as iptables-save has it, so that it can be given back as it was.
type state struct {
	Tool   Tool
	Table  string
	Chains []string // ours
	Rules  []string // of our chains, each beginning with "-A CHAIN "
	Jumps  []string // in the kernel's chains into ours, the same way
	First  bool     // nobody's rule stands before our jumps
}

func (s state) empty() bool { return len(s.Chains) == 0 && len(s.Jumps) == 0 }

// readState looks into every table of every packet filter of the host.
func readState(ctx context.Context) ([]state, error) {
	var found []state
	for _, f := range []redirect.Family{redirect.IPv4, redirect.IPv6} {
		seen := make(map[Flavour]bool)
		for _, tool := range programs(ctx, f) {
			if seen[tool.Flavour] {
				continue
			}
			seen[tool.Flavour] = true
			for _, table := range tables {
				s, err := readTable(ctx, tool, table)
				if err != nil {
					return nil, err
				}
				if !s.empty() {
					found = append(found, s)
				}
			}
		}
	}
	return found, nil
}

func readTable(ctx context.Context, tool Tool, table string) (state, error) {
	s := state{Tool: tool, Table: table, First: true}
	lines, err := save(ctx, tool, table)
	if err != nil {
		return s, err
	}
	others := make(map[string]bool) // chains of the kernel in which somebody else's rule was seen
	for _, l := range lines {
		switch chain := chainOf(l); {
		case strings.HasPrefix(l, ":"+chainPrefix):
			s.Chains = append(s.Chains, strings.Fields(l[1:])[0])
		case strings.HasPrefix(chain, chainPrefix):
			s.Rules = append(s.Rules, l)
		case chain != "" && jumpsToUs(l):
			s.Jumps = append(s.Jumps, l)
			s.First = s.First && !others[chain]
		case chain != "":
			others[chain] = true
		}
	}
	return s, nil
}

// chainOf is the chain of a rule, "" of any other line.
func chainOf(line string) string {
	rest, ok := strings.CutPrefix(line, "-A ")
	if !ok {
		return ""
	}
	chain, _, _ := strings.Cut(rest, " ")
	return chain
}

func jumpsToUs(line string) bool {
	return strings.Contains(line, " -j "+chainPrefix) || strings.Contains(line, " -g "+chainPrefix)
}

// wanted is the state that a table of a plan is to have, with the rules that are in no plan. The comments of the jumps end
// with the digest of the table, so that two plans whose rules differ in their matches alone are not taken for the same.
func wanted(t redirect.Table, tool Tool, more []redirect.PacketRule) state {
	s := state{Tool: tool, Table: t.Name, Chains: t.Chains, First: true}
	for _, r := range slices.Concat(t.Rules, more) {
		if !slices.Contains(s.Chains, r.Chain) {
			s.Chains = append(slices.Clone(s.Chains), r.Chain)
		}
		s.Rules = append(s.Rules, line(r))
	}
	sum := digest(t)
	for _, j := range t.Jumps {
		j.Why += " [" + sum + "]"
		s.Jumps = append(s.Jumps, line(j))
	}
	return s
}

// digest is of all that a plan says about a table.
func digest(t redirect.Table) string {
	h := sha256.New()
	for _, r := range slices.Concat(t.Rules, t.Jumps) {
		fmt.Fprintln(h, line(r))
	}
	return hex.EncodeToString(h.Sum(nil)[:4])
}

// only is the part of a state that is one of our chains; but is the rest.
func (s state) only(chain string) state {
	s.Jumps, s.Chains = nil, slices.DeleteFunc(slices.Clone(s.Chains), func(c string) bool { return c != chain })
	s.Rules = slices.DeleteFunc(slices.Clone(s.Rules), func(r string) bool { return chainOf(r) != chain })
	return s
}

func (s state) but(chain string) state {
	s.Chains = slices.DeleteFunc(slices.Clone(s.Chains), func(c string) bool { return c == chain })
	s.Rules = slices.DeleteFunc(slices.Clone(s.Rules), func(r string) bool { return chainOf(r) == chain })
	return s
}

// line writes a rule with its comment.
func line(r redirect.PacketRule) string {
	words := []string{"-A", r.Chain}
	if r.Match != "" {
		words = append(words, r.Match)
	}
	return strings.Join(append(words, fmt.Sprintf("-m comment --comment %q", r.Why), r.Target), " ")
}

// transaction leads from one state of a table to another, in one step: our chains are written anew, jumps into them are
// taken away where they are and put before everything else.
func transaction(from, to state) string {
	var b strings.Builder
	fmt.Fprintf(&b, "*%s\n", to.Table)
	for _, c := range to.Chains {
		fmt.Fprintf(&b, ":%s - [0:0]\n", c)
	}
	for _, r := range to.Rules {
		fmt.Fprintln(&b, r)
	}
	for _, j := range from.Jumps {
		fmt.Fprintln(&b, "-D"+strings.TrimPrefix(j, "-A"))
	}
	for _, j := range slices.Backward(to.Jumps) {
		chain := chainOf(j)
		fmt.Fprintln(&b, "-I "+chain+" 1"+strings.TrimPrefix(j, "-A "+chain))
	}
	var gone []string
	for _, c := range from.Chains {
		if !slices.Contains(to.Chains, c) {
			gone = append(gone, c)
			fmt.Fprintf(&b, "-F %s\n", c)
		}
	}
	for _, c := range gone {
		fmt.Fprintf(&b, "-X %s\n", c)
	}
	b.WriteString("COMMIT\n")
	return b.String()
}

// apply brings the tables of one tool from what they are to what they should be. Each table is a transaction of its own,
// so an error may come after some of them.
func apply(ctx context.Context, tool Tool, from, to []state) error {
	order := slices.Clone(tables)
	if !slices.ContainsFunc(to, func(s state) bool { return len(s.Jumps) > 0 }) { // all is taken away
		slices.Reverse(order)
	}
	var b strings.Builder
	for _, table := range order {
		was, has := at(from, tool, table)
		will, wants := at(to, tool, table)
		if has || wants {
			b.WriteString(transaction(was, will))
		}
	}
	if b.Len() == 0 {
		return nil
	}
	return restore(ctx, tool, b.String())
}

// at finds the state of a table; an empty one where there is none.
func at(list []state, tool Tool, table string) (state, bool) {
	for _, s := range list {
		if s.Tool.Family == tool.Family && s.Tool.Flavour == tool.Flavour && s.Table == table {
			return s, true
		}
	}
	return state{Tool: tool, Table: table}, false
}

// sameAs reports whether the state is the wanted one. The program that lists rules writes them in its own words, so they
// are compared by their comments, which say what each is for and which plan they are of, and by their targets.
func (s state) sameAs(want state) bool {
	return s.First && slices.Equal(gist(s.Rules), gist(want.Rules)) && slices.Equal(gist(s.Jumps), gist(want.Jumps))
}

// gist is what is compared of a rule: its chain, its comment, and the kind of its target. Chains may be listed in any
// order; the rules of a chain may not.
func gist(rules []string) []string {
	list := make([]string, len(rules))
	for i, r := range rules {
		target := ""
		for _, word := range []string{" -j ", " -g "} {
			if _, rest, ok := strings.Cut(r, word); ok {
				target = word + strings.Fields(rest)[0]
			}
		}
		list[i] = chainOf(r) + "|" + commentOf(r) + "|" + target
	}
	slices.SortStableFunc(list, func(a, b string) int {
		return strings.Compare(a[:strings.Index(a, "|")], b[:strings.Index(b, "|")])
	})
	return list
}

// commentOf is the comment of a rule, without its quotes.
func commentOf(rule string) string {
	_, rest, ok := strings.Cut(rule, "--comment ")
	if !ok {
		return ""
	}
	if !strings.HasPrefix(rest, `"`) {
		word, _, _ := strings.Cut(rest, " ")
		return word
	}
	var comment strings.Builder
	for i := 1; i < len(rest) && rest[i] != '"'; i++ {
		if rest[i] == '\\' && i+1 < len(rest) { // xtables_save_string in libxtables escapes quotes and backslashes
			i++
		}
		comment.WriteByte(rest[i])
	}
	return comment.String()
}
