// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"

	"github.com/pillionproxy/pillion/config"
	"github.com/spf13/pflag"
)

// selectionFlags binds which connections are captured. Their names are those that config.Verdict gives.
func selectionFlags(f *pflag.FlagSet, s *config.Selection) {
	selectorFlags(f, "outbound-ports", "outbound connections to these ports", "port|first-last", &s.OutboundPorts, config.ParsePorts)
	selectorFlags(f, "outbound-cidrs", "outbound connections to these addresses", "address|prefix", &s.OutboundCIDRs, config.ParseCIDRs)
	selectorFlags(f, "outbound-interfaces", "outbound connections that leave by these interfaces", "name|begin*", &s.OutboundInterfaces, config.ParseInterfaces)
	selectorFlags(f, "uids", "outbound connections of these users", "id|first-last", &s.UIDs, config.ParseIDs)
	selectorFlags(f, "gids", "outbound connections of these groups", "id|first-last", &s.GIDs, config.ParseIDs)
	selectorFlags(f, "inbound-ports", "connections to these ports of the app", "port|first-last", &s.InboundPorts, config.ParsePorts)
	selectorFlags(f, "inbound-cidrs", "connections from these addresses", "address|prefix", &s.InboundCIDRs, config.ParseCIDRs)
	selectorFlags(f, "inbound-interfaces", "connections that come in by these interfaces", "name|begin*", &s.InboundInterfaces, config.ParseInterfaces)
	f.Var(&listFlag[string]{"path", &s.ExcludeCgroups, parsePath}, "exclude-cgroups", "leave alone what the processes of these cgroup2 directories do")
}

func selectorFlags[T fmt.Stringer](f *pflag.FlagSet, name, what, kind string, s *config.Selector[T], parse func(string) ([]T, error)) {
	f.Var(&listFlag[T]{kind, &s.Include, parse}, "include-"+name, "capture only "+what)
	f.Var(&listFlag[T]{kind, &s.Exclude, parse}, "exclude-"+name, "leave alone "+what)
}

// listFlag is a comma separated list; given again, it adds to what there is.
type listFlag[T any] struct {
	kind  string
	list  *[]T
	parse func(string) ([]T, error)
}

func (l *listFlag[T]) Set(s string) error {
	more, err := l.parse(s)
	if err != nil {
		return err
	}
	*l.list = append(*l.list, more...)
	return nil
}

func (l *listFlag[T]) String() string {
	if l.list == nil { // pflag asks a zero value for its default
		return ""
	}
	entries := make([]string, len(*l.list))
	for i, v := range *l.list {
		entries[i] = fmt.Sprint(v)
	}
	return strings.Join(entries, ",")
}

func (l *listFlag[T]) Type() string { return l.kind }

// parsePath reads one path: a comma may be part of it.
func parsePath(s string) ([]string, error) { return []string{s}, nil }
