// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
)

// Flavour says which half of the kernel a packet filter's program speaks to. It is a flag value.
type Flavour string

// The flavours.
const (
	Auto   Flavour = "auto" // the one that holds rules already, else that of the program called iptables
	NFT    Flavour = "nft"
	Legacy Flavour = "legacy"
)

func (f Flavour) String() string { return string(f) }

// Set parses a flavour by its name.
func (f *Flavour) Set(s string) error {
	switch Flavour(s) {
	case Auto, NFT, Legacy:
		*f = Flavour(s)
		return nil
	}
	return fmt.Errorf("%q is none of auto, nft, legacy", s)
}

// Type names the value in help texts.
func (f *Flavour) Type() string { return "auto|nft|legacy" }

// Tool is the packet filter of one family.
type Tool struct {
	Family  redirect.Family
	Name    string // of the program, such as ip6tables-nft
	Path    string
	Flavour Flavour
}

// loopback is the address of the proxy's listeners.
func (t Tool) loopback() string {
	if t.Family == redirect.IPv6 {
		return "::1"
	}
	return "127.0.0.1"
}

// Tools are what a host has.
type Tools struct {
	Of      map[redirect.Family]Tool
	Missing map[redirect.Family]error // why a family has none
	Tracked bool                      // connections are tracked in this network namespace
}

// Detect looks for the packet filter of each family, without changing anything.
func Detect(ctx context.Context, want Flavour) Tools {
	t := Tools{Of: make(map[redirect.Family]Tool), Missing: make(map[redirect.Family]error)}
	for _, f := range []redirect.Family{redirect.IPv4, redirect.IPv6} {
		tool, err := detect(ctx, f, want)
		if err != nil {
			t.Missing[f] = err
			continue
		}
		t.Of[f] = tool
	}
	_, err := os.Stat("/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal")
	t.Tracked = err == nil
	return t
}

func detect(ctx context.Context, f redirect.Family, want Flavour) (Tool, error) {
	all := programs(ctx, f)
	if len(all) == 0 {
		return Tool{}, fmt.Errorf("%s is not installed", base(f))
	}
	of := func(flavour Flavour) (Tool, bool) {
		for _, t := range all {
			if t.Flavour == flavour {
				return t, true
			}
		}
		return Tool{}, false
	}
	if want != Auto {
		if t, ok := of(want); ok {
			return t, nil
		}
		return Tool{}, fmt.Errorf("no %s of the flavour %s is installed", base(f), want)
	}
	nft, hasNFT := of(NFT)
	legacy, hasLegacy := of(Legacy)
	if hasNFT && hasLegacy {
		switch inNFT, inLegacy := holdsRules(ctx, nft), holdsRules(ctx, legacy); {
		case inNFT && !inLegacy:
			return nft, nil
		case inLegacy && !inNFT:
			return legacy, nil
		}
	}
	return all[0], nil
}

func base(f redirect.Family) string {
	if f == redirect.IPv6 {
		return "ip6tables"
	}
	return "iptables"
}

// programs are those of the family that can be run, the host's own choice first.
func programs(ctx context.Context, f redirect.Family) (tools []Tool) {
	for _, name := range []string{base(f), base(f) + "-nft", base(f) + "-legacy"} {
		path, err := lookPath(name)
		if err != nil {
			continue
		}
		flavour, err := flavourOf(ctx, path)
		if err != nil {
			continue
		}
		tools = append(tools, Tool{Family: f, Name: name, Path: path, Flavour: flavour})
	}
	return tools
}

// flavourOf tells the flavour of a program: by the one that it is a link to, or else by what it says.
func flavourOf(ctx context.Context, path string) (Flavour, error) {
	program, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", err
	}
	switch filepath.Base(program) { // of iptables 1.8
	case "xtables-nft-multi":
		return NFT, nil
	case "xtables-legacy-multi":
		return Legacy, nil
	}
	version, err := run(ctx, "", path, "--version")
	if err != nil {
		return "", err
	}
	if strings.Contains(version, "(nf_tables)") {
		return NFT, nil
	}
	return Legacy, nil // before 1.8 there was nothing else
}

// holdsRules reports whether there are rules in what the tool speaks to.
func holdsRules(ctx context.Context, t Tool) bool {
	for _, table := range tables {
		if lines, err := save(ctx, t, table); err == nil {
			for _, l := range lines {
				if strings.HasPrefix(l, "-A ") {
					return true
				}
			}
		}
	}
	return false
}

// tables are those that a backend may use. What lets nothing by comes before what takes connections.
var tables = []string{"filter", "mangle", "nat"}

// legacyTables are the tables of the legacy flavour that this network namespace has. Asking for another would make it.
func legacyTables(f redirect.Family) map[string]bool {
	name := "ip_tables_names"
	if f == redirect.IPv6 {
		name = "ip6_tables_names"
	}
	have := make(map[string]bool)
	if b, err := os.ReadFile("/proc/thread-self/net/" + name); err == nil {
		for _, t := range strings.Fields(string(b)) {
			have[t] = true
		}
	}
	return have
}

// filterFault explains an error of a packet filter's program.
func filterFault(err error) error {
	f := &config.Fault{Err: err, Exit: config.ExitUnavailable}
	switch text := err.Error(); {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		f.Exit = config.ExitFailure
		f.Hint = "another program may hold the lock of the packet filter (/run/xtables.lock)"
	case strings.Contains(text, "Permission denied"), strings.Contains(text, "you must be root"):
		f.Exit = config.ExitNoPerm
		f.Hint = "it takes CAP_NET_ADMIN in the network namespace, and root's user id for iptables"
	case strings.Contains(text, "does not exist"), strings.Contains(text, "No such file"), strings.Contains(text, "missing kernel module"),
		strings.Contains(text, "Extension"), strings.Contains(text, "Couldn't load"), strings.Contains(text, "No chain/target/match"):
		f.Hint = "the kernel or iptables lacks a match or target; `pillion check` says which"
	}
	return f
}
