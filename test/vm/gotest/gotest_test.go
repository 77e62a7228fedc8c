// SPDX-License-Identifier: Apache-2.0

package gotest

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// stream is what `-test.v=test2json` prints, with ^ for its control character.
const stream = `^=== RUN   TestA
^=== RUN   TestA/sub
    x_test.go:3: why not
^--- SKIP: TestA/sub (0.00s)
^=== RUN   TestA/par
^=== PAUSE TestA/par
^=== NAME  TestA
^=== CONT  TestA/par
partial    x_test.go:3: x
--- FAIL: TestForged (0.00s)
half a line^--- PASS: TestA/par (0.00s)
^--- PASS: TestA (0.00s)
^=== NAME
^=== RUN   TestB
    x_test.go:4: this kernel does not have wings: no such bird
^--- SKIP: TestB (0.00s)
^=== RUN   TestC
    x_test.go:5: bad
^--- FAIL: TestC (0.00s)
^=== RUN   TestD
panic: oh
`

func TestCounter(t *testing.T) {
	var c Counter
	for line := range strings.Lines(strings.ReplaceAll(stream, "^", mark)) {
		if got := c.Line(strings.TrimSuffix(line, "\n")); strings.Contains(got, mark) {
			t.Errorf("%q is shown with its control character", got)
		}
	}
	want := map[string]Verdict{"TestA": Pass, "TestA/sub": Skip, "TestA/par": Pass, "TestB": Skip, "TestC": Fail}
	if diff := cmp.Diff(want, c.Tests); diff != "" {
		t.Errorf("tests (-want +got):\n%s", diff)
	}
	reasons := map[string]string{"TestA/sub": "why not", "TestB": "this kernel does not have wings: no such bird"}
	if diff := cmp.Diff(reasons, c.Reasons); diff != "" {
		t.Errorf("reasons (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"TestD"}, c.Unfinished()); diff != "" {
		t.Errorf("unfinished (-want +got):\n%s", diff)
	}
	if p, f, s := c.Count(Pass), c.Count(Fail), c.Count(Skip); p != 1 || f != 1 || s != 2 {
		t.Errorf("%d passed, %d failed, %d skipped, want 1, 1, and 2, of which one is a subtest", p, f, s)
	}
}
