// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/pillionproxy/pillion/config"
	"go.yaml.in/yaml/v3"
)

// document is one of a stream, between two lines of "---".
type document struct {
	file  string
	line  int // of its first line in the file, from 0
	text  []byte
	lines []int        // where each line begins
	ascii map[int]bool // of lines that were asked for: a column is a byte there
	root  *yaml.Node
	seen  map[*yaml.Node]bool // objects whose templates were looked for: an alias may lead back
}

var separator = regexp.MustCompile(`(?m)^(---|\.\.\.)(\s|$)`)

// documents cuts a stream where a document ends. Put together again they are the stream. The separating line belongs to the
// document behind it.
func documents(file string, stream []byte) []*document {
	cuts := []int{0}
	for _, m := range separator.FindAllIndex(stream, -1) {
		if m[0] > 0 {
			cuts = append(cuts, m[0])
		}
	}
	var docs []*document
	line, counted := 0, 0
	for i, from := range cuts {
		to := len(stream)
		if i+1 < len(cuts) {
			to = cuts[i+1]
		}
		line += bytes.Count(stream[counted:from], []byte("\n"))
		counted = from
		docs = append(docs, newDocument(file, line, stream[from:to]))
	}
	return docs
}

func newDocument(file string, line int, text []byte) *document {
	d := &document{file: file, line: line, text: text, lines: []int{0}}
	for i, b := range text {
		if b == '\n' {
			d.lines = append(d.lines, i+1)
		}
	}
	return d
}

var byteOrderMark = []byte("\ufeff")

// parse reads the document; there is no root where it is empty, or a directive that belongs to the next one.
func (d *document) parse() error {
	var n yaml.Node
	text := d.text
	if bytes.HasPrefix(bytes.TrimPrefix(text, byteOrderMark), []byte("%")) && onlyDirectives.Match(text) {
		return nil
	}
	if bytes.HasPrefix(text, []byte("...")) { // ends the one before, and may be followed by comments
		text = append([]byte("   "), text[3:]...)
	}
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	if err := decoder.Decode(&n); err != nil && !errors.Is(err, io.EOF) {
		return d.syntaxError(err)
	}
	if err := decoder.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return &config.Fault{
			Err:  fmt.Errorf("%s:%d: a second object without a line of --- before it", d.file, d.line+1),
			Hint: "put --- between them, or make a List of them", Exit: config.ExitConfig,
		}
	}
	if n.Kind == yaml.DocumentNode && len(n.Content) == 1 {
		d.root = n.Content[0]
	}
	return nil
}

var yamlLine = regexp.MustCompile(`^yaml: (?:unmarshal errors:\n\s*)?line (\d+): `)

// syntaxError tells the line in the file.
func (d *document) syntaxError(err error) error {
	message, line := err.Error(), 1
	if m := yamlLine.FindStringSubmatch(message); m != nil {
		line, _ = strconv.Atoi(m[1])
		message = message[len(m[0]):]
	}
	return &config.Fault{
		Err:  fmt.Errorf("%s:%d: %s", d.file, d.line+line, strings.TrimPrefix(message, "yaml: ")),
		Hint: "it is no YAML; `kubectl apply --dry-run=server` would refuse it too",
		Exit: config.ExitConfig,
	}
}

// onlyDirectives is a document of directives, comments and empty lines: they belong to the document behind it.
var onlyDirectives = regexp.MustCompile(`\A\x{feff}?(?:[%#][^\n]*(?:\n|\z)|[ \t\r]*\n)*[ \t\r]*\z`)

// at makes an error of a place in the document.
func (d *document) at(n *yaml.Node, hint, format string, args ...any) error {
	return &config.Fault{
		Err:  fmt.Errorf("%s:%d:%d: %s", d.file, d.line+n.Line, n.Column, fmt.Sprintf(format, args...)),
		Hint: hint, Exit: config.ExitConfig,
	}
}

// offset is where a node begins in the text.
func (d *document) offset(n *yaml.Node) int {
	at := d.lines[n.Line-1]
	if n.Line == 1 && bytes.HasPrefix(d.text, byteOrderMark) {
		at += len(byteOrderMark)
	}
	if d.isASCII(n.Line) {
		return at + n.Column - 1
	}
	for range n.Column - 1 {
		_, size := utf8.DecodeRune(d.text[at:])
		at += size
	}
	return at
}

func (d *document) isASCII(line int) bool {
	is, known := d.ascii[line]
	if !known {
		to := len(d.text)
		if line < len(d.lines) {
			to = d.lines[line]
		}
		is = !slices.ContainsFunc(d.text[d.lines[line-1]:to], func(b byte) bool { return b >= utf8.RuneSelf })
		if d.ascii == nil {
			d.ascii = make(map[int]bool)
		}
		d.ascii[line] = is
	}
	return is
}

// lineStart is where the line of a node begins, lineOf what stands in a line, without its end.
func (d *document) lineStart(n *yaml.Node) int { return d.lines[n.Line-1] }

func (d *document) lineOf(number int) string {
	if number < 1 || number > len(d.lines) {
		return ""
	}
	line, _, _ := bytes.Cut(d.text[d.lines[number-1]:], []byte("\n"))
	return strings.TrimSuffix(string(line), "\r")
}

// newline is how lines end where a node is.
func (d *document) newline(n *yaml.Node) string {
	line, _, _ := bytes.Cut(d.text[d.lineStart(n):], []byte("\n"))
	if bytes.HasSuffix(line, []byte("\r")) {
		return "\r\n"
	}
	return "\n"
}

// edit replaces a part of the text.
type edit struct {
	from, to int
	with     string
}

// apply makes the edits. The same place is edited once, however often it is named: by an alias. Edits that overlap are an
// error: the comments are no longer where they were written.
func (d *document) apply(edits []edit) ([]byte, error) {
	slices.SortStableFunc(edits, func(a, b edit) int { return a.from - b.from })
	edits = slices.Compact(edits)
	var out bytes.Buffer
	at := 0
	for _, e := range edits {
		if e.from < at || e.to < e.from {
			return nil, d.at(d.root, "take out by hand what `pillion inject` wrote", "the comments %q and %q do not stand in pairs", begin, end)
		}
		out.Write(d.text[at:e.from])
		out.WriteString(e.with)
		at = e.to
	}
	out.Write(d.text[at:])
	return out.Bytes(), nil
}

// field is a key of a mapping and its value; nil where there is none.
type field struct{ key, value *yaml.Node }

// get finds a key, through aliases but not through merges: what is merged in is written elsewhere.
func get(n *yaml.Node, key string) field {
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

// template is a pod or the template of pods.
type template struct {
	node     *yaml.Node // has metadata and spec
	metadata *yaml.Node
	spec     *yaml.Node
}

// templatePaths lead from an object to its pod template.
var templatePaths = map[string][]string{
	"Pod": {}, "PodTemplate": {"template"},
	"Deployment": {"spec", "template"}, "StatefulSet": {"spec", "template"}, "DaemonSet": {"spec", "template"},
	"ReplicaSet": {"spec", "template"}, "ReplicationController": {"spec", "template"}, "Job": {"spec", "template"},
	"CronJob": {"spec", "jobTemplate", "spec", "template"},
}

// templates finds the pod templates of an object.
func (d *document) templates(object *yaml.Node) ([]template, error) {
	if object = resolved(object); object == nil || object.Kind == yaml.ScalarNode && (object.Value == "" || object.Tag == "!!null") {
		return nil, nil
	}
	if d.seen[object] {
		return nil, nil
	}
	if d.seen == nil {
		d.seen = make(map[*yaml.Node]bool)
	}
	d.seen[object] = true
	kind := text(get(object, "kind").value)
	if kind == "" {
		return nil, d.at(object, "a Kubernetes object begins with apiVersion and kind", "no kind")
	}
	if kind == "List" || strings.HasSuffix(kind, "List") && get(object, "items").value != nil {
		var all []template
		var errs []error
		for _, item := range items(get(object, "items").value) {
			t, err := d.templates(item)
			all, errs = append(all, t...), append(errs, err)
		}
		return all, errors.Join(errs...)
	}
	path, known := templatePaths[kind]
	group, _, hasGroup := strings.Cut(text(get(object, "apiVersion").value), "/")
	if !known || hasGroup && group != "apps" && group != "batch" { // a kind of the same name, of somebody else
		return nil, nil
	}
	node := find(object, path...)
	if node == nil || node.Kind != yaml.MappingNode || find(node, "spec") == nil {
		return nil, d.at(object, "kubectl explain "+kind+" shows what it must have", "a %s without the spec of a pod", kind)
	}
	return []template{{node: node, metadata: find(node, "metadata"), spec: find(node, "spec")}}, nil
}
