// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"strings"
	"testing"
)

// TestTwoPodsInOneText: a spec that two pods have by an alias has one sidecar, which must be what both ask for.
func TestTwoPodsInOneText(t *testing.T) {
	const list = "kind: List\nitems:\n"
	const first = "- kind: Pod\n  metadata: {annotations: {pillion.dev/log-level: warn}}\n  spec: &s\n    containers:\n    - name: a\n"
	for name, tt := range map[string]struct {
		text string
		says []string
	}{
		"other annotations": {
			list + first + "- kind: Pod\n  metadata: {annotations: {pillion.dev/log-level: info}}\n  spec: *s\n",
			[]string{"f.yaml:8:3: this pod and that of line 3 have one spec by an alias (line 5)"},
		},
		"none of it": {list + first + "- kind: Pod\n  metadata: {annotations: {pillion.dev/inject: 'false'}}\n  spec: *s\n", []string{"f.yaml:8:3: this pod and that of line 3"}},
		"the first wants none of it": {
			list + strings.Replace(first, "log-level: warn", "inject: 'false'", 1) + "- kind: Pod\n  spec: *s\n",
			[]string{"f.yaml:8:3: this pod and that of line 3"},
		},
		"templates": {
			list + "- kind: Job\n  spec:\n    template:\n      metadata: {annotations: {pillion.dev/log-level: warn}}\n      spec: &s {containers: [{name: a}]}\n- kind: Job\n  spec: {template: {spec: *s}}\n",
			[]string{"f.yaml:9:20: this pod and that of line 6"},
		},
		"a mesh of the other": {list + first + "- kind: Pod\n  metadata: {annotations: {linkerd.io/proxy-version: x}}\n  spec: *s\n", []string{"f.yaml:9:28: the pod is in Linkerd"}},
		"a kind that is not known": {
			list + "- kind: Pod\n  spec: &s\n    containers:\n    - name: a\n- {apiVersion: example.com/v1, kind: Widget, spec: *s}\n",
			[]string{"f.yaml:1: the sidecar cannot be written", "something else would change"},
		},
		"by a merge, which wants none of it": {list + first + "- kind: Pod\n  metadata: {annotations: {pillion.dev/inject: 'false'}}\n  spec:\n    <<: *s\n    hostname: b\n", []string{"f.yaml:1: the sidecar cannot be written"}},
		"by a merge, with containers of its own": {
			list + first + "- kind: Pod\n  metadata: {annotations: {pillion.dev/inject: 'false'}}\n  spec:\n    <<: *s\n    containers: [{name: b}]\n",
			[]string{"f.yaml:1: the sidecar cannot be written"},
		},
		"the host's network by a merge":    {"x: &x {hostNetwork: true}\nkind: Pod\nspec:\n  <<: *x\n  containers: [{name: a}]\n", []string{"f.yaml:1:21: hostNetwork"}},
		"a wrong annotation by a merge":    {"kind: List\nmetadata: &m {annotations: {pillion.dev/x: y}}\nitems: [{kind: Pod, metadata: {<<: *m}, spec: {containers: [{name: a}]}}]\n", []string{"f.yaml:2:29: annotation pillion.dev/x: unknown"}},
		"an anchor of another document":    {"kind: Pod\nspec: &s {containers: [{name: a}]}\n---\nkind: Pod\nspec: *s\n", []string{"f.yaml:", "unknown anchor 's'"}},
		"more aliases than the YAML wants": {"kind: List\nitems: [&a [x,x,x,x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b], &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c], &e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d], &f [*e,*e,*e,*e,*e,*e,*e,*e,*e,*e]]\n", []string{"excessive aliasing"}},
	} {
		t.Run(name, func(t *testing.T) { refused(t, tt.text, settings(), tt.says...) })
	}
}

// TestOnePodByAnAlias: pods that are provably the same, or share no more than what is not written into, are injected, and
// given back.
func TestOnePodByAnAlias(t *testing.T) {
	const list = "kind: List\nitems:\n"
	for name, tt := range map[string]struct {
		text     string
		sidecars int // in the text
	}{
		"the whole object":           {list + "- &p\n  kind: Pod\n  spec:\n    containers:\n    - name: a\n- *p\n", 1},
		"the whole template":         {list + "- kind: Job\n  spec: &s {template: {metadata: {annotations: {pillion.dev/log-level: warn}}, spec: {containers: [{name: a}]}}}\n- kind: Job\n  spec: *s\n", 1},
		"the spec, annotated alike":  {list + "- kind: Pod\n  metadata: {name: a, annotations: {pillion.dev/log-level: warn}}\n  spec: &s\n    containers:\n    - name: a\n- kind: Pod\n  metadata: {name: b, annotations: {pillion.dev/log-level: warn}}\n  spec: *s\n", 1},
		"the spec, without metadata": {list + "- kind: Pod\n  spec: &s\n    containers:\n    - name: a\n- kind: Pod\n  spec: *s\n", 1},
		"the metadata":               {list + "- kind: Pod\n  metadata: &m {annotations: {pillion.dev/log-level: warn}}\n  spec:\n    containers:\n    - name: a\n- kind: Pod\n  metadata: *m\n  spec:\n    containers:\n    - name: b\n", 2},
		"neither wants it":           {list + "- kind: Pod\n  metadata: {annotations: {pillion.dev/inject: 'false'}}\n  spec: &s {containers: [{name: a}]}\n- kind: Pod\n  metadata: {annotations: {pillion.dev/inject: disabled}}\n  spec: *s\n", 0},
		"annotations by a merge":     {list + "- kind: Pod\n  metadata: {annotations: &m {pillion.dev/log-level: warn}}\n  spec: {containers: [{name: a}]}\n- kind: Pod\n  metadata: {annotations: {<<: *m}}\n  spec: {containers: [{name: b}]}\n", 2},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := inject("f.yaml", []byte(tt.text), settings())
			if err != nil {
				t.Fatal(err)
			}
			if n := strings.Count(string(out), "pillion-init"); n != tt.sidecars {
				t.Errorf("%d sidecars, want %d:\n%s", n, tt.sidecars, out)
			}
			if want := strings.Count(tt.text, "log-level: warn"); want > 0 && !strings.Contains(string(out), "--log-level=warn") {
				t.Errorf("the annotation was not heeded:\n%s", out)
			}
			if back, err := Uninject("f.yaml", out); err != nil || string(back) != tt.text {
				t.Errorf("%v\n%s", err, back)
			}
		})
	}
}
