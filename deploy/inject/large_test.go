// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
)

// TestLarge: manifests of ten megabytes are injected as small ones are. What took time by the square of the size would not
// end here.
func TestLarge(t *testing.T) {
	if testing.Short() {
		t.Skip("manifests of ten megabytes")
	}
	const size = 10 << 20
	fill := func(part string, size int) string { return strings.Repeat(part, size/len(part)) }
	const deployment = "---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\nspec:\n  template:\n    spec:\n      containers:\n      - {name: a, image: b}\n"
	const configMap = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\ndata:\n  k: "
	document := deployment + "        args:\n        - |\n" + strings.Repeat("          größer * & : {\n", 400)
	document = strings.Replace(document, "{name: a, image: b}", "name: a", 1)
	pod := `,{"apiVersion":"v1","kind":"Pod","metadata":{"annotations":{"größer":"` + strings.Repeat("日本語 * ", 50) + `"}},"spec":{"containers":[{"name":"a","image":"b"}]}}`
	for name, tt := range map[string]struct {
		text string
		pods int
	}{
		"many documents":            {fill(document, size/4), size / 4 / len(document)},
		"a ConfigMap of many lines": {configMap + "|\n" + fill("    line * & : {\n", size) + deployment, 1},
		"a ConfigMap of one line":   {configMap + `"` + fill(`größer\n`, size/4) + "\"\n" + deployment, 1},
		"a ConfigMap of many keys":  {configMap + "v\n" + keys(size/16) + deployment, 1},
		"a list in one line":        {`{"apiVersion":"v1","kind":"List","items":[` + fill(pod, size/16)[1:] + "]}\n", size / 16 / len(pod)},
		"a kind that is not known":  {"apiVersion: example.com/v1\nkind: Widget\nspec:\n" + keys(size/16) + deployment, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out, warnings, err := Inject("large", []byte(tt.text), settings())
			if err != nil {
				t.Fatal(err)
			}
			if n := bytes.Count(out, []byte("pillion-init")); n != tt.pods || len(warnings) > 0 {
				t.Errorf("%d sidecars in %d pods, %d warnings", n, tt.pods, len(warnings))
			}
			if back, err := Uninject("large", out); err != nil || string(back) != tt.text {
				t.Errorf("not given back: %v", err)
			}
		})
	}
}

// keys are lines of a mapping.
func keys(size int) string {
	var b strings.Builder
	for i := 0; b.Len() < size; i++ {
		fmt.Fprintf(&b, "  key%d: value\n", i)
	}
	return b.String()
}
