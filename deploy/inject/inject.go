// SPDX-License-Identifier: Apache-2.0

// Package inject writes the sidecar into Kubernetes manifests, and takes it out again.
//
// What always holds: it is a function of text, and touches nothing else. What it writes stands by itself: in block style
// between two comments, in flow style and JSON as whole entries of a list; every other byte of the manifest stays what it is,
// and Uninject gives back the very text that Inject was given. Injecting what is injected writes it anew, so that the same
// settings give the same text.
package inject

import (
	"bytes"
	"errors"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Inject writes the sidecar into every pod template of a stream of documents, YAML or JSON. The file's name is for errors,
// which are faults and say where; all of them are told at once, and nothing is returned then.
func Inject(file string, stream []byte, s Settings) ([]byte, error) {
	clean, err := Uninject(file, stream)
	if err != nil {
		return nil, err
	}
	injected, err := each(file, clean, func(d *document, t template) ([]edit, error) {
		s, wanted, err := s.of(d, t)
		if err != nil || !wanted {
			return nil, err
		}
		if err := refuse(d, t, s); err != nil {
			return nil, err
		}
		var edits []edit
		for _, l := range s.lists() {
			edits = append(edits, insert(d, t, l))
		}
		return edits, nil
	})
	if err != nil {
		return nil, err
	}
	if err := proveInjected(file, clean, injected); err != nil {
		return nil, err
	}
	return injected, nil
}

// Uninject takes out what Inject wrote.
func Uninject(file string, stream []byte) ([]byte, error) {
	if err := readable(file, stream); err != nil {
		return nil, err
	}
	clean, err := uninject(file, stream)
	if err != nil {
		return nil, err
	}
	if err := proveClean(file, stream, clean); err != nil {
		return nil, err
	}
	return clean, nil
}

func uninject(file string, stream []byte) ([]byte, error) {
	return each(file, stream, func(d *document, t template) (edits []edit, err error) {
		for _, name := range listNames {
			e, found, err := extract(d, t, name)
			if err != nil {
				return nil, err
			}
			if found {
				edits = append(edits, e)
			}
		}
		return edits, nil
	})
}

// each makes the edits of every pod template.
func each(file string, stream []byte, change func(*document, template) ([]edit, error)) ([]byte, error) {
	var out []byte
	var errs []error
	for _, d := range documents(file, stream) {
		if err := d.parse(); err != nil {
			return nil, err
		}
		templates, err := d.templates(d.root)
		errs = append(errs, err)
		var edits []edit
		done := make(map[*yaml.Node]bool) // the same by an alias
		for _, t := range templates {
			if done[t.spec] {
				continue
			}
			done[t.spec] = true
			e, err := change(d, t)
			edits, errs = append(edits, e...), append(errs, err)
		}
		text, err := d.apply(edits)
		errs = append(errs, err)
		out = append(out, text...)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return out, nil
}

// listNames are the lists of a pod's spec that are written into.
var listNames = []string{"initContainers", "containers", "volumes"}

// list is what is put at the beginning of one of them.
type list struct {
	name    string
	entries []*yaml.Node
}

// Comments around what is written in block style.
const (
	begin = "# pillion: begin (written by `pillion inject`, taken out by `pillion uninject`)"
	end   = "# pillion: end"
)

// insert writes the entries at the beginning of a list, which it begins where there is none.
func insert(d *document, t template, l list) edit {
	f := get(t.spec, l.name)
	value := resolved(f.value)
	first := get(t.spec, "containers").key // every pod has them
	switch {
	case f.key == nil && isFlow(t.spec): // before the containers
		at := d.offset(first)
		return edit{at, at, `"` + l.name + `":[` + strings.Join(compact(l.entries), ",") + "],"}
	case f.key == nil:
		at := d.lineStart(first)
		whole := &yaml.Node{Kind: yaml.MappingNode, Content: []*yaml.Node{
			{Kind: yaml.ScalarNode, Value: l.name}, {Kind: yaml.SequenceNode, Content: l.entries},
		}}
		return edit{at, at, block(whole, first.Column-1, d.newline(first))}
	case isFlow(value):
		at := d.offset(value) + 1 // behind the bracket
		text := strings.Join(compact(l.entries), ",")
		if len(value.Content) > 0 {
			text += ","
		}
		return edit{at, at, text}
	default:
		at := d.lineStart(value)
		return edit{at, at, block(&yaml.Node{Kind: yaml.SequenceNode, Content: l.entries}, value.Column-1, d.newline(value))}
	}
}

func isFlow(n *yaml.Node) bool { return n.Style&yaml.FlowStyle != 0 }

// extract finds what insert wrote.
func extract(d *document, t template, name string) (e edit, found bool, err error) {
	f := get(t.spec, name)
	if f.key == nil {
		return e, false, nil
	}
	value := resolved(f.value)
	switch {
	case value.Kind != yaml.SequenceNode:
		return e, false, nil
	case isFlow(t.spec) && bytes.HasPrefix(d.text[d.offset(f.key):], []byte(`"`+name+`":[{"name":"`+ownPrefix)) && allOurs(name, value):
		at := d.offset(f.key)
		to, err := jsonEnd(d.text, at+len(`"`+name+`":`))
		if err != nil {
			return e, false, d.at(f.key, "", "%v", err)
		}
		if to >= len(d.text) || d.text[to] != ',' {
			return e, false, nil // moved to the end: somebody wrote it anew
		}
		return edit{at, to + 1, ""}, true, nil
	case isFlow(value):
		return extractEntries(d, name, value)
	}
	for _, n := range []*yaml.Node{f.key, value} { // the key is ours too, or the entries alone
		if strings.TrimLeft(d.lineOf(n.Line-1), " ") == begin {
			return extractLines(d, n)
		}
	}
	return e, false, nil
}

// extractLines takes out from the comment above a node to the one that ends it.
func extractLines(d *document, n *yaml.Node) (e edit, found bool, err error) {
	for number := n.Line; number <= len(d.lines); number++ {
		if strings.TrimLeft(d.lineOf(number), " ") == begin {
			break
		}
		if strings.TrimLeft(d.lineOf(number), " ") == end {
			to := len(d.text)
			if number < len(d.lines) {
				to = d.lines[number]
			}
			return edit{d.lines[n.Line-2], to, ""}, true, nil
		}
	}
	return e, false, d.at(n, "take out by hand what stands behind it", "%q is there, and no %q below it", begin, end)
}

// extractEntries takes our entries out of the beginning of a list in flow style.
func extractEntries(d *document, name string, value *yaml.Node) (e edit, found bool, err error) {
	at := d.offset(value) + 1
	to := at
	for i, n := range value.Content {
		if !isOurs(name, n) || d.offset(n) != to || !bytes.HasPrefix(d.text[to:], []byte(`{"name":"`+ownPrefix)) {
			break
		}
		if to, err = jsonEnd(d.text, to); err != nil {
			return e, false, d.at(n, "", "%v", err)
		}
		if i+1 < len(value.Content) && to < len(d.text) && d.text[to] == ',' {
			to++
		}
	}
	return edit{at, to, ""}, to > at, nil
}

// ownPrefix begins the names of what we write.
const ownPrefix = "pillion"

// Names of what is written.
const (
	initName    = ownPrefix + "-init"
	sidecarName = ownPrefix
	cgroupName  = ownPrefix + "-cgroup"
)

// isOurs tells an entry of a list that Inject wrote from one that has its name by chance.
func isOurs(list string, entry *yaml.Node) bool {
	verb := ""
	if args := items(get(entry, "args").value); len(args) > 0 {
		verb = text(args[0])
	}
	switch name := text(get(entry, "name").value); list {
	case "volumes":
		return name == cgroupName
	case "containers":
		return name == sidecarName && verb == "proxy"
	default:
		return name == initName && verb == "init" || name == sidecarName && verb == "proxy"
	}
}

func allOurs(list string, sequence *yaml.Node) bool {
	return len(sequence.Content) > 0 && !slices.ContainsFunc(sequence.Content, func(n *yaml.Node) bool { return !isOurs(list, n) })
}

// faults collects the errors of one template.
type faults struct{ list []error }

func (f *faults) add(d *document, n *yaml.Node, hint, format string, args ...any) {
	f.list = append(f.list, d.at(n, hint, format, args...))
}

func (f *faults) err() error { return errors.Join(f.list...) }
