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

// proveInjected holds what was injected against what it was injected into.
func proveInjected(file string, clean, injected []byte) error {
	if bytes.Equal(clean, injected) {
		return nil
	}
	back, err := uninject(file, injected)
	if err != nil || !bytes.Equal(back, clean) {
		return layoutFault(file, clean, injected, err)
	}
	return same(file, clean, injected)
}

// proveClean holds what was taken out against what it was taken out of, and finds a sidecar that is still there.
func proveClean(file string, stream, clean []byte) error {
	if err := same(file, clean, stream); err != nil {
		return err
	}
	for _, d := range documents(file, clean) {
		if err := d.parse(); err != nil {
			return err
		}
		templates, err := d.templates(d.root)
		if err != nil {
			return err
		}
		for _, t := range templates {
			for _, list := range listNames {
				for _, entry := range items(get(t.spec, list).value) {
					if isOurs(list, entry) {
						return d.at(entry, "take it out of "+list+" by hand, or start from the manifest that was injected",
							"%s is of the sidecar, but no longer as `pillion inject` wrote it: was the manifest written anew by another program?", text(get(entry, "name").value))
					}
				}
			}
		}
	}
	return nil
}

// same reports a difference between two streams in anything but what is ours.
func same(file string, before, after []byte) error {
	if bytes.Equal(before, after) {
		return nil
	}
	a, errA := values(file, before)
	b, errB := values(file, after)
	if err := errors.Join(errA, errB); err != nil || !reflect.DeepEqual(a, b) {
		return layoutFault(file, before, after, err)
	}
	return nil
}

// layoutFault tells the document in which the difference is.
func layoutFault(file string, before, after []byte, err error) error {
	line := 1
	docs, others := documents(file, before), documents(file, after)
	for i, d := range docs {
		line = d.line + 1
		if i >= len(others) {
			break
		}
		a, errA := values(file, d.text)
		b, errB := values(file, others[i].text)
		if errA != nil || errB != nil || !reflect.DeepEqual(a, b) {
			break
		}
	}
	if err == nil {
		err = errors.New("beside the sidecar something else would change")
	}
	return &config.Fault{
		Err:  fmt.Errorf("%s:%d: the sidecar cannot be written into the text of this object, or taken out of it: %w", file, line, err),
		Hint: "anchors, tags and merges (<<) at the lists of a pod, keys that stand twice, or behind a question mark, are not understood: write the object plainly, for example by `kubectl create --dry-run=client -o yaml -f`",
		Exit: config.ExitConfig,
	}
}

// values are what a stream says, without what is ours.
func values(file string, stream []byte) (all []any, err error) {
	for _, d := range documents(file, stream) {
		if err := d.parse(); err != nil {
			return nil, err
		}
		if d.root == nil {
			continue
		}
		var v any
		if err := d.root.Decode(&v); err != nil {
			return nil, err
		}
		all = append(all, without(v))
	}
	return all, nil
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
