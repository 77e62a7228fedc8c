// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
)

func TestNoteIsReadAsItWasWritten(t *testing.T) {
	for _, n := range []note{
		{Backend: TProxy, Slot: 7, Plan: "8d2f6a01", Tracked: true, Sysctls: []string{"0", "", "1", "0"}, Made: []string{"ip.mangle", "ip6.filter.INPUT"}},
		{Backend: Redirect, Plan: "00000000"},
	} {
		got, ok := parseNote(n.String())
		if diff := cmp.Diff(n, got); !ok || diff != "" {
			t.Errorf("%s: %t (-want +got)\n%s", n, ok, diff)
		}
	}
	for _, bad := range []string{
		"", "pillion", "pillion backend=", "pillion backend=ebpf slot=0", "pillion backend=tproxy slot=8", "pillion backend=tproxy slot=-1",
		"somebody's pillion backend=tproxy slot=0",
	} {
		if n, ok := parseNote(bad); ok {
			t.Errorf("%q is no note, and was read as %s", bad, n)
		}
	}
}

// The policy is cut into comments, and every one fits.
func TestPolicyIsReadAsItWasWritten(t *testing.T) {
	policy := selective()
	for p := range uint16(500) {
		policy.Selection.OutboundPorts.Include = append(policy.Selection.OutboundPorts.Include, config.PortRange{First: 2 * p, Last: 2 * p})
	}
	rules, err := policyRules(note{Backend: TProxy}, policy)
	if err != nil {
		t.Fatal(err)
	}
	s := wanted(redirect.Table{Name: "mangle"}, Tool{}, rules)
	for _, r := range rules {
		if len(r.Why) > 255 {
			t.Errorf("a comment of %d bytes: %s", len(r.Why), r.Why)
		}
	}
	got, err := policyOf([]state{{}, s})
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, &policy) {
		t.Errorf("%+v, want %+v", got, policy)
	}
	s.Rules = slices.Delete(s.Rules, 2, 3) // of 1 for the note and many for the policy
	if p, err := policyOf([]state{s}); err == nil {
		t.Errorf("a part is missing, and the policy was read as %+v", p)
	}
	if p, err := policyOf(nil); p != nil || err != nil {
		t.Errorf("%v, %v, want none", p, err)
	}
}

// Two plans whose rules have the same comments and targets are told apart.
func TestAnotherMatchIsAnotherState(t *testing.T) {
	table := func(match string) redirect.Table {
		return redirect.Table{
			Name: "mangle", Chains: []string{chainOut},
			Rules: []redirect.PacketRule{{Chain: chainOut, Match: match, Target: "-j RETURN", Why: "the proxy's own"}},
			Jumps: []redirect.PacketRule{{Chain: "OUTPUT", Match: "-p tcp", Target: "-j " + chainOut, Why: "what the host sends"}},
		}
	}
	is := wanted(table("--sport 20000"), Tool{}, nil)
	if !is.sameAs(wanted(table("--sport 20000"), Tool{}, nil)) {
		t.Error("a table is not the same as itself")
	}
	if is.sameAs(wanted(table("--sport 20001"), Tool{}, nil)) {
		t.Error("a table with another match is the same")
	}
}

func TestCommentsAreReadAsTheyWereWritten(t *testing.T) {
	for _, why := range []string{"word", "two words", `a "quoted" one`, `back\slash`, "-j ACCEPT", "it's -g PILLION_OUT", "§ über"} {
		r := redirect.PacketRule{Chain: chainOut, Match: "-p tcp", Target: "-j RETURN", Why: why}
		if got := commentOf(line(r)); got != why {
			t.Errorf("%s: %q, want %q", line(r), got, why)
		}
	}
	if got := commentOf("-A PILLION_OUT -m comment --comment word -j RETURN"); got != "word" {
		t.Errorf("%q, want the comment without quotes", got)
	}
}

// A transaction leaves the wanted state whatever there was, and touches nothing of anybody else.
func TestTransaction(t *testing.T) {
	tool := Tool{Family: redirect.IPv4, Flavour: NFT}
	old := state{
		Tool: tool, Table: "mangle", Chains: []string{chainOut, "PILLION_STALE"},
		Rules: []string{"-A PILLION_OUT -j RETURN", "-A PILLION_STALE -j ACCEPT"},
		Jumps: []string{"-A OUTPUT -p udp -j PILLION_STALE", "-A OUTPUT -p tcp -j PILLION_OUT"}, First: true,
	}
	next := state{
		Tool: tool, Table: "mangle", Chains: []string{chainOut, chainIn},
		Rules: []string{"-A PILLION_OUT -j ACCEPT", "-A PILLION_IN -j ACCEPT"},
		Jumps: []string{"-A OUTPUT -p tcp -j PILLION_OUT", "-A PREROUTING -j PILLION_IN"}, First: true,
	}
	none := state{Tool: tool, Table: "mangle", First: true}
	for _, tt := range []struct {
		name     string
		from, to state
	}{{"install", none, next}, {"install again", next, next}, {"replace", old, next}, {"take back", next, old}, {"remove", old, none}} {
		t.Run(tt.name, func(t *testing.T) {
			is := newFake("mangle", tt.from)
			if err := is.run(transaction(tt.from, tt.to)); err != nil {
				t.Fatalf("%v\n%s", err, transaction(tt.from, tt.to))
			}
			got := is.state(tool)
			if !got.sameAs(tt.to) || len(got.Chains) != len(tt.to.Chains) {
				t.Errorf("it left %+v, want %+v", got, tt.to)
			}
			if others := is.chains["OUTPUT"]; !slices.Contains(others, "-A OUTPUT -j SOMEBODY") {
				t.Errorf("it took away somebody's rule: %v", others)
			}
		})
	}
}

// fake is a table as iptables-restore --noflush changes it (iptables-restore(8)).
type fake struct {
	table  string
	chains map[string][]string
}

func newFake(table string, s state) *fake {
	f := &fake{table, map[string][]string{"OUTPUT": nil, "PREROUTING": nil}}
	for _, c := range s.Chains {
		f.chains[c] = nil
	}
	for _, r := range append(slices.Clone(s.Jumps), s.Rules...) {
		f.chains[chainOf(r)] = append(f.chains[chainOf(r)], r)
	}
	f.chains["OUTPUT"] = append(f.chains["OUTPUT"], "-A OUTPUT -j SOMEBODY")
	return f
}

func (f *fake) run(transaction string) error {
	lines := strings.Split(strings.TrimSpace(transaction), "\n")
	if lines[0] != "*"+f.table || lines[len(lines)-1] != "COMMIT" {
		return fmt.Errorf("no transaction: %v", lines)
	}
	for _, l := range lines[1 : len(lines)-1] {
		words := strings.Fields(l)
		if name, ok := strings.CutPrefix(words[0], ":"); ok {
			f.chains[name] = nil
			continue
		}
		chain := words[1]
		rules, there := f.chains[chain]
		if !there {
			return fmt.Errorf("%s: no such chain", l)
		}
		switch words[0] {
		case "-A":
			f.chains[chain] = append(rules, l)
		case "-I":
			f.chains[chain] = slices.Insert(rules, 0, "-A "+chain+" "+strings.Join(words[3:], " "))
		case "-D":
			i := slices.Index(rules, "-A"+strings.TrimPrefix(l, "-D"))
			if i < 0 {
				return fmt.Errorf("%s: no such rule", l)
			}
			f.chains[chain] = slices.Delete(rules, i, i+1)
		case "-F":
			f.chains[chain] = nil
		case "-X":
			if len(rules) > 0 {
				return fmt.Errorf("%s: not empty", l)
			}
			for _, all := range f.chains {
				for _, r := range all {
					if strings.HasSuffix(r, " "+chain) {
						return fmt.Errorf("%s: %s jumps to it", l, r)
					}
				}
			}
			delete(f.chains, chain)
		default:
			return fmt.Errorf("%s: unknown", l)
		}
	}
	return nil
}

// state reads the table as readTable does.
func (f *fake) state(tool Tool) state {
	s := state{Tool: tool, Table: f.table, First: true}
	for chain, rules := range f.chains {
		ours := strings.HasPrefix(chain, chainPrefix)
		if ours {
			s.Chains = append(s.Chains, chain)
		}
		for i, r := range rules {
			switch {
			case ours:
				s.Rules = append(s.Rules, r)
			case jumpsToUs(r):
				s.Jumps = append(s.Jumps, r)
				s.First = s.First && (i == 0 || jumpsToUs(rules[i-1]))
			}
		}
	}
	return s
}
