// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/ulikunitz/xz"
)

// Module is one kernel module, as its own .modinfo section describes it.
type Module struct {
	Name    string // with _ in place of -
	Needs   []string
	Aliases []string
	Content []byte // the ELF file, uncompressed
}

// readModule reads a module from its file, compressed or not.
func readModule(file string, content []byte) (Module, error) {
	base := path.Base(file)
	switch {
	case strings.HasSuffix(base, ".ko"):
	case strings.HasSuffix(base, ".ko.xz"):
		base = strings.TrimSuffix(base, ".xz")
		r, err := xz.NewReader(bytes.NewReader(content))
		if err == nil {
			content, err = io.ReadAll(r)
		}
		if err != nil {
			return Module{}, fmt.Errorf("module %s: %w", file, err)
		}
	default:
		return Module{}, fmt.Errorf("module %s: compressed in a way that is not known here (xz is)", file)
	}
	m := Module{Name: normal(strings.TrimSuffix(base, ".ko")), Content: content}
	f, err := elf.NewFile(bytes.NewReader(content))
	if err != nil {
		return m, fmt.Errorf("module %s: %w", file, err)
	}
	section := f.Section(".modinfo")
	if section == nil {
		return m, fmt.Errorf("module %s: no .modinfo section", file)
	}
	info, err := section.Data()
	if err != nil {
		return m, fmt.Errorf("module %s: %w", file, err)
	}
	m.Needs, m.Aliases = parseModinfo(info)
	return m, nil
}

// parseModinfo reads what a module needs and by which aliases it is asked for: "key=value" each, ended by a zero byte.
func parseModinfo(info []byte) (needs, aliases []string) {
	for entry := range bytes.SplitSeq(info, []byte{0}) {
		key, value, _ := strings.Cut(string(entry), "=")
		switch key {
		case "depends":
			for name := range strings.SplitSeq(value, ",") {
				if name != "" {
					needs = append(needs, normal(name))
				}
			}
		case "softdep":
			// "pre: a b post: c": what comes before is wanted, though not needed.
			before, _, _ := strings.Cut(value, "post:")
			if list, ok := strings.CutPrefix(strings.TrimSpace(before), "pre:"); ok {
				for _, name := range strings.Fields(list) {
					needs = append(needs, normal(name))
				}
			}
		case "alias":
			if !strings.ContainsAny(value, " \t\n") {
				aliases = append(aliases, value)
			}
		}
	}
	return needs, aliases
}
