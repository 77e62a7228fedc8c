// SPDX-License-Identifier: Apache-2.0

package inject

import "go.yaml.in/yaml/v3"

// field is a key of a mapping and its value; nil where there is none.
type field struct{ key, value *yaml.Node }

// own finds a key that is written in the mapping itself, or in the one that it is an alias of.
func own(n *yaml.Node, key string) field {
	n = resolved(n)
	if n == nil || n.Kind != yaml.MappingNode {
		return field{}
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return field{n.Content[i], n.Content[i+1]}
		}
	}
	return field{}
}

// get finds a key, through aliases and merges, as whoever reads the object would: what is merged in is written elsewhere.
func get(n *yaml.Node, key string) field {
	for _, m := range merged(n) {
		if f := own(m, key); f.key != nil {
			return f
		}
	}
	return field{}
}

// merged are a mapping and those that it merges in (<<), each once, the one that has the say first.
func merged(n *yaml.Node) (all []*yaml.Node) {
	var add func(*yaml.Node)
	seen := make(map[*yaml.Node]bool) // a merge may lead back
	add = func(n *yaml.Node) {
		if n = resolved(n); n == nil || n.Kind != yaml.MappingNode || seen[n] {
			return
		}
		seen[n] = true
		all = append(all, n)
		for i := 0; i+1 < len(n.Content); i += 2 {
			if n.Content[i].Tag != "!!merge" {
				continue
			}
			add(n.Content[i+1])
			for _, m := range items(n.Content[i+1]) {
				add(m)
			}
		}
	}
	add(n)
	return all
}

// fields are the keys of a mapping, merged ones too, each with the value that has the say.
func fields(n *yaml.Node) (all []field) {
	seen := make(map[string]bool)
	for _, m := range merged(n) {
		for i := 0; i+1 < len(m.Content); i += 2 {
			if key := m.Content[i]; key.Tag != "!!merge" && !seen[key.Value] {
				seen[key.Value] = true
				all = append(all, field{key, resolved(m.Content[i+1])})
			}
		}
	}
	return all
}

// find follows keys.
func find(n *yaml.Node, keys ...string) *yaml.Node {
	for _, k := range keys {
		n = get(n, k).value
	}
	return resolved(n)
}

func resolved(n *yaml.Node) *yaml.Node {
	for n != nil && n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	return n
}

// text is the value of a scalar, "" of anything else.
func text(n *yaml.Node) string {
	if n = resolved(n); n == nil || n.Kind != yaml.ScalarNode {
		return ""
	}
	return n.Value
}

// items are the entries of a sequence.
func items(n *yaml.Node) []*yaml.Node {
	if n = resolved(n); n == nil || n.Kind != yaml.SequenceNode {
		return nil
	}
	list := make([]*yaml.Node, len(n.Content))
	for i, c := range n.Content {
		list[i] = resolved(c)
	}
	return list
}
