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
// which are faults and say where; all of them are told at once, and nothing is returned then. Warnings are for people, and
// change nothing.
func Inject(file string, stream []byte, s Settings) (injected []byte, warnings []Warning, err error) {
	injected, err = each(file, stream, func(d *document) (*document, error) {
		clean, err := d.uninject()
		if err != nil {
			return nil, err
		}
		d, more, err := clean.inject(s)
		warnings = append(warnings, more...)
		return d, err
	})
	if err != nil {
		return nil, nil, err
	}
	return injected, warnings, nil
}

// Uninject takes out what Inject wrote.
func Uninject(file string, stream []byte) ([]byte, error) {
	return each(file, stream, (*document).uninject)
}

// each makes another document of every one, one after the other: a stream may be long.
func each(file string, stream []byte, of func(*document) (*document, error)) ([]byte, error) {
	if err := readable(file, stream); err != nil {
		return nil, err
	}
	var out []byte
	var errs []error
	for _, d := range documents(file, stream) {
		changed, err := of(d)
		d.forget()
		if err != nil {
			errs = append(errs, err)
			continue
		}
		out = append(out, changed.text...)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return out, nil
}

// inject writes the sidecar into a document that has none.
func (d *document) inject(s Settings) (injected *document, warnings []Warning, err error) {
	same := make(map[string][]list) // of pods with the same settings, of which there may be thousands
	edits, all, err := rewrite{
		object: func(o object, t *template) error {
			warnings = append(warnings, warnOfObject(d, o)...)
			switch {
			case o.list:
				return misplacedInList(d, o)
			case t != nil:
				return misplaced(d, t)
			}
			return nil
		},
		pod: func(t template) (change, error) {
			its, wanted, err := s.of(d, t)
			if err != nil || !wanted {
				return change{}, err
			}
			if err := refuse(d, t, its); err != nil {
				return change{}, err
			}
			warnings = append(warnings, warnOfOrder(d, t, its)...)
			lists, known := same[its.key()]
			if !known {
				lists = its.lists()
				same[its.key()] = lists
			}
			c := change{lists: lists}
			for _, l := range c.lists {
				c.edits = append(c.edits, insert(d, t, l))
			}
			return c, nil
		},
	}.document(d)
	if err != nil {
		return nil, nil, err
	}
	if injected, err = d.apply(edits); err != nil {
		return nil, nil, err
	}
	return injected, warnings, proveInjected(d, injected, all)
}

// uninject takes the sidecar out of a document.
func (d *document) uninject() (*document, error) {
	clean, err := d.takeOut()
	if err != nil {
		return nil, err
	}
	return clean, proveClean(d, clean)
}

// takeOut is uninject without a proof.
func (d *document) takeOut() (*document, error) {
	edits, _, err := rewrite{pod: func(t template) (c change, err error) {
		for _, name := range listNames {
			e, found, err := extract(d, t, name)
			if err != nil {
				return c, err
			}
			if found {
				c.edits = append(c.edits, e)
			}
		}
		return c, nil
	}}.document(d)
	if err != nil {
		return nil, err
	}
	return d.apply(edits)
}

// rewrite is what to do with a document.
type rewrite struct {
	object func(object, *template) error  // with every object, and its template if it has one; may be nil
	pod    func(template) (change, error) // with every pod, once
}

// change is what becomes of a pod: edits of its text, and what they write.
type change struct {
	edits []edit
	lists []list
}

// written is a pod template that was written into.
type written struct {
	path  []any // in the document
	lists []list
}

// document collects the edits of a document.
func (do rewrite) document(d *document) (edits []edit, all []written, err error) {
	if err := d.parse(); err != nil {
		return nil, nil, err
	}
	objects, err := d.objects()
	errs := []error{err}
	done := make(map[pod]change)
	first := make(map[*yaml.Node]template) // of those that have this spec
	for _, o := range objects {
		t, err := d.template(o)
		errs = append(errs, err)
		if do.object != nil {
			errs = append(errs, do.object(o, t))
		}
		if t == nil {
			continue
		}
		c, known := done[t.pod()]
		if !known {
			c, err = do.pod(*t)
			errs = append(errs, err)
			done[t.pod()] = c
			if other, shared := first[t.spec]; !shared && err == nil {
				first[t.spec] = *t
			} else if err == nil && !slices.Equal(c.edits, done[other.pod()].edits) {
				errs = append(errs, sharedSpec(d, *t, other))
			}
		}
		edits = append(edits, c.edits...)
		if len(c.lists) > 0 {
			all = append(all, written{path: t.path, lists: c.lists})
		}
	}
	return edits, all, errors.Join(errs...)
}

// sharedSpec refuses one text for two pods that want different ones: the annotations of one would decide for the other.
func sharedSpec(d *document, t, other template) error {
	return d.at(t.node, "write the spec twice, without an alias, or annotate both alike",
		"this pod and that of line %d have one spec by an alias (line %d), but annotations (%s*) that ask for different sidecars", d.line+other.node.Line, d.line+t.spec.Line, AnnotationPrefix)
}

// listNames are the lists of a pod's spec that are written into.
var listNames = []string{"initContainers", "containers", "volumes"}

// list is what is put at the beginning of one of them.
type list struct {
	name    string
	entries []*yaml.Node
	data    []any // the entries as whoever reads them has them
}

// Comments around what is written in block style.
const (
	begin = "# pillion: begin (written by `pillion inject`, taken out by `pillion uninject`)"
	end   = "# pillion: end"
)

// insert writes the entries at the beginning of a list, which it begins where there is none.
func insert(d *document, t template, l list) edit {
	f := own(t.spec, l.name)
	value := resolved(f.value)
	first := own(t.spec, "containers").key // every pod has them
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
	f := own(t.spec, name)
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
