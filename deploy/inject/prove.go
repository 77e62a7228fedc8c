// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"unicode/utf8"

	"github.com/pillionproxy/pillion/config"
	"go.yaml.in/yaml/v3"
)

// What is edited as text is proven as data: the manifests say what they said before, and beside it what was written. A layout
// that this package does not understand is an error, and never a damaged manifest.

// readable refuses text in which this package would not find the places that the YAML parser tells.
func readable(file string, stream []byte) error {
	fault := func(at int, format string, args ...any) error {
		return &config.Fault{
			Err:  fmt.Errorf("%s:%d: %s", file, 1+bytes.Count(stream[:at], []byte("\n")), fmt.Sprintf(format, args...)),
			Hint: "save it as UTF-8, with lines that end with a newline", Exit: config.ExitConfig,
		}
	}
	if bytes.HasPrefix(stream, []byte("\xff\xfe")) || bytes.HasPrefix(stream, []byte("\xfe\xff")) {
		return fault(0, "UTF-16, which kubectl does not read either")
	}
	for at := 0; at < len(stream); {
		r, size := utf8.DecodeRune(stream[at:])
		switch {
		case r == utf8.RuneError && size == 1:
			return fault(at, "byte %#x is no UTF-8", stream[at])
		case r == '\r' && (at+1 == len(stream) || stream[at+1] != '\n'):
			return fault(at, "a carriage return without a newline behind it")
		case r == '\u0085', r == '\u2028', r == '\u2029':
			return fault(at, "the character U+%04X, which YAML takes for the end of a line", r)
		}
		at += size
	}
	return nil
}

// proveInjected holds what was injected against what it was injected into: taken out it is that again, and as data it is that
// with each pod's own entries in its lists. So no alias or merge carries a sidecar to where it was not asked for.
func proveInjected(clean, injected *document, all []written) error {
	if len(all) == 0 && bytes.Equal(clean.text, injected.text) {
		return nil
	}
	expected, errClean := clean.value()
	clean.forget()
	if back, err := injected.takeOut(); err != nil || !bytes.Equal(back.text, clean.text) {
		return clean.layoutFault(err)
	}
	got, errInjected := injected.value()
	injected.forget()
	err := errors.Join(errClean, errInjected)
	for _, w := range all {
		if err == nil {
			err = w.put(expected)
		}
	}
	if err != nil || !reflect.DeepEqual(expected, got) {
		return clean.layoutFault(err)
	}
	return nil
}

// put writes into a value what was written into the text that it is of.
func (w written) put(v any) error {
	for _, key := range append(slices.Clone(w.path), "spec") {
		switch at := key.(type) {
		case int:
			list, _ := v.([]any)
			if at >= len(list) {
				return errNotFound
			}
			v = list[at]
		case string:
			object, _ := v.(map[string]any)
			v = object[at]
		}
	}
	spec, ok := v.(map[string]any)
	if !ok {
		return errNotFound
	}
	for _, l := range w.lists {
		there, _ := spec[l.name].([]any)
		spec[l.name] = append(slices.Clone(l.data), there...)
	}
	return nil
}

var errNotFound = errors.New("a pod is not found again")

// proveClean holds what was taken out against what it was taken out of, and finds a sidecar that is still there.
func proveClean(d, clean *document) error {
	if !bytes.Equal(d.text, clean.text) {
		before, errBefore := d.value()
		after, errAfter := clean.value()
		if err := errors.Join(errBefore, errAfter); err != nil || !reflect.DeepEqual(without(before), without(after)) {
			return d.layoutFault(err)
		}
	}
	_, _, err := rewrite{pod: func(t template) (c change, err error) { return c, stillThere(clean, t) }}.document(clean)
	return err
}

// stillThere refuses a pod that has entries of ours, but not where Inject writes them.
func stillThere(d *document, t template) error {
	for _, list := range listNames {
		for _, entry := range items(get(t.spec, list).value) {
			if isOurs(list, entry) {
				return d.at(entry, "take it out of "+list+" by hand, or start from the manifest that was injected",
					"%s is of the sidecar, but no longer as `pillion inject` wrote it: was the manifest written anew by another program?", text(get(entry, "name").value))
			}
		}
	}
	return nil
}

func (d *document) layoutFault(err error) error {
	if err == nil {
		err = errors.New("beside the sidecar something else would change")
	}
	return &config.Fault{
		Err:  fmt.Errorf("%s:%d: the sidecar cannot be written into the text of this object, or taken out of it: %w", d.file, d.line+1, err),
		Hint: "anchors, tags and merges (<<) at the lists of a pod or around them, keys that stand twice, or behind a question mark, are not understood: write the object plainly, for example by `kubectl create --dry-run=client -o yaml -f`",
		Exit: config.ExitConfig,
	}
}

// value is what a document says.
func (d *document) value() (v any, err error) {
	if err := d.parse(); err != nil || d.root == nil {
		return nil, err
	}
	return v, d.root.Decode(&v)
}

// without takes our entries out of the lists of every pod in a value; a list that is empty then is not there.
func without(v any) any {
	switch v := v.(type) {
	case []any:
		for i := range v {
			v[i] = without(v[i])
		}
	case map[string]any:
		for key, value := range v {
			list, isList := value.([]any)
			if isList && slices.Contains(listNames, key) {
				list = slices.DeleteFunc(slices.Clone(list), func(entry any) bool {
					var n yaml.Node
					return n.Encode(entry) == nil && isOurs(key, &n)
				})
				value = list
			}
			if slices.Contains(listNames, key) && len(list) == 0 && (isList || value == nil) {
				delete(v, key)
				continue
			}
			v[key] = without(value)
		}
	}
	return v
}
