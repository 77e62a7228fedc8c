// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
)

// Index says of each module what it needs, and by which names it is asked for.
type Index struct {
	needs   map[string][]string
	aliases []alias
}

type alias struct{ pattern, module string }

// NewIndex makes the index of modules.
func NewIndex(modules []Module) Index {
	x := Index{needs: map[string][]string{}}
	for _, m := range modules {
		x.needs[m.Name] = m.Needs
		for _, a := range m.Aliases {
			x.aliases = append(x.aliases, alias{a, m.Name})
		}
	}
	return x
}

// String writes the index as text that ParseIndex reads: a line "module NAME NEEDS…" or "alias PATTERN NAME" each.
func (x Index) String() string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(x.needs)) {
		fmt.Fprintln(&b, strings.Join(append([]string{"module", name}, x.needs[name]...), " "))
	}
	for _, a := range x.aliases {
		fmt.Fprintln(&b, "alias", a.pattern, a.module)
	}
	return b.String()
}

// ParseIndex reads what String wrote.
func ParseIndex(text string) Index {
	x := Index{needs: map[string][]string{}}
	for line := range strings.Lines(text) {
		switch fields := strings.Fields(line); {
		case len(fields) >= 2 && fields[0] == "module":
			x.needs[fields[1]] = fields[2:]
		case len(fields) == 3 && fields[0] == "alias":
			x.aliases = append(x.aliases, alias{fields[1], fields[2]})
		}
	}
	return x
}

// Order lists the modules that the names stand for, by their own name or an alias, each after those that it needs. A name
// that stands for nothing is left out.
func (x Index) Order(names ...string) []string {
	var order []string
	var add func(string)
	add = func(name string) {
		needs, known := x.needs[name]
		if !known || slices.Contains(order, name) {
			return
		}
		for _, n := range needs {
			add(n)
		}
		order = append(order, name)
	}
	for _, name := range names {
		own := normal(name)
		if _, known := x.needs[own]; known {
			add(own)
			continue
		}
		for _, a := range x.aliases {
			if ok, _ := path.Match(normal(a.pattern), own); ok {
				add(a.module)
			}
		}
	}
	return order
}

// normal is a name of a module as the kernel has it: it takes - and _ for the same.
func normal(name string) string { return strings.ReplaceAll(name, "-", "_") }
