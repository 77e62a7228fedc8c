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
	file   string
	line   int // of its first line in the file, from 0
	text   []byte
	lines  []int         // where each line begins
	marks  map[int][]int // of lines that were asked for: see offset
	parsed bool
	root   *yaml.Node
}

// separates reports whether a line, and what is behind it, begins another document or ends one.
func separates(text []byte) bool {
	if !bytes.HasPrefix(text, []byte("---")) && !bytes.HasPrefix(text, []byte("...")) {
		return false
	}
	return len(text) == 3 || bytes.IndexByte([]byte(" \t\n\f\r"), text[3]) >= 0
}

// documents cuts a stream where a document ends. Put together again they are the stream. The separating line belongs to the
// document behind it.
func documents(file string, stream []byte) []*document {
	cuts := []int{0}
	for at := 0; ; {
		line := bytes.IndexByte(stream[at:], '\n')
		if line < 0 {
			break
		}
		if at += line + 1; separates(stream[at:]) {
			cuts = append(cuts, at)
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
	if d.parsed {
		return nil
	}
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
	d.parsed = true
	return nil
}

// forget lets go of what was parsed, which takes many times the place of the text.
func (d *document) forget() { d.root, d.parsed, d.marks = nil, false, nil }

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

// markEvery is how many columns lie between two marks of a line.
const markEvery = 256

// offset is where a node begins in the text. A column is a character: in a line that is not ASCII it is counted from the
// last mark before it, for a line may be a whole list of thousands of pods.
func (d *document) offset(n *yaml.Node) int {
	marks := d.marksOf(n.Line)
	if len(marks) == 1 {
		return marks[0] + n.Column - 1
	}
	column := n.Column - 1
	at := marks[min(column/markEvery, len(marks)-1)]
	for range column % markEvery {
		_, size := utf8.DecodeRune(d.text[at:])
		at += size
	}
	return at
}

// marksOf is where every so many columns of a line begin, or where an ASCII line does.
func (d *document) marksOf(number int) []int {
	if marks, known := d.marks[number]; known {
		return marks
	}
	at, to := d.lines[number-1], len(d.text)
	if number < len(d.lines) {
		to = d.lines[number]
	}
	if number == 1 && bytes.HasPrefix(d.text, byteOrderMark) {
		at += len(byteOrderMark)
	}
	marks := []int{at}
	if slices.ContainsFunc(d.text[at:to], func(b byte) bool { return b >= utf8.RuneSelf }) {
		for column := 1; at < to; column++ {
			_, size := utf8.DecodeRune(d.text[at:])
			if at += size; column%markEvery == 0 {
				marks = append(marks, at)
			}
		}
		marks = append(marks, at) // so that there are two at least
	}
	if d.marks == nil {
		d.marks = make(map[int][]int)
	}
	d.marks[number] = marks
	return marks
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
func (d *document) apply(edits []edit) (*document, error) {
	if len(edits) == 0 {
		return d, nil
	}
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
	if len(documents(d.file, out.Bytes())) != 1 {
		return nil, d.layoutFault(nil)
	}
	return newDocument(d.file, d.line, out.Bytes()), nil
}
