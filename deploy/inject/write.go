// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"

	"go.yaml.in/yaml/v3"
)

// block writes a node in block style, indented, between the comments.
func block(n *yaml.Node, indent int, newline string) string {
	var buf bytes.Buffer
	e := yaml.NewEncoder(&buf)
	e.SetIndent(2)
	if err := e.Encode(n); err != nil {
		panic(fmt.Sprintf("inject: a node of our own cannot be written: %v", err)) // a fault of this package
	}
	var out strings.Builder
	for _, line := range append(append([]string{begin}, strings.Split(strings.TrimSuffix(buf.String(), "\n"), "\n")...), end) {
		out.WriteString(strings.Repeat(" ", indent) + line + newline)
	}
	return out.String()
}

// compact writes entries as JSON without any space, which is YAML in flow style as well.
func compact(entries []*yaml.Node) []string {
	list := make([]string, len(entries))
	for i, e := range entries {
		var b strings.Builder
		writeJSON(&b, e)
		list[i] = b.String()
	}
	return list
}

func writeJSON(b *strings.Builder, n *yaml.Node) {
	switch n.Kind {
	case yaml.MappingNode:
		b.WriteByte('{')
		for i := 0; i+1 < len(n.Content); i += 2 {
			if i > 0 {
				b.WriteByte(',')
			}
			writeJSON(b, n.Content[i])
			b.WriteByte(':')
			writeJSON(b, n.Content[i+1])
		}
		b.WriteByte('}')
	case yaml.SequenceNode:
		b.WriteByte('[')
		for i, c := range n.Content {
			if i > 0 {
				b.WriteByte(',')
			}
			writeJSON(b, c)
		}
		b.WriteByte(']')
	default:
		if n.Tag == "!!int" || n.Tag == "!!bool" {
			b.WriteString(n.Value)
			return
		}
		quoted, _ := json.Marshal(n.Value) // a string can always be written
		b.Write(quoted)
	}
}

// jsonEnd is the offset behind the JSON value that begins at an offset.
func jsonEnd(text []byte, at int) (int, error) {
	d := json.NewDecoder(bytes.NewReader(text[at:]))
	var v json.RawMessage
	if err := d.Decode(&v); err != nil {
		return 0, fmt.Errorf("what `pillion inject` wrote was changed since, and cannot be taken out: %w", err)
	}
	return at + int(d.InputOffset()), nil
}
