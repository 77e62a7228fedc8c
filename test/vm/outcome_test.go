// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/test/vm/machine"
	"github.com/pillionproxy/pillion/test/vm/wire"
)

// heard makes the outcome of one kernel whose only suite printed the lines, and the text that was shown meanwhile.
func heard(t *testing.T, series string, end *wire.End, lines ...string) (*outcome, *strings.Builder) {
	t.Helper()
	var out strings.Builder
	o := &outcome{series: series, version: series + ".1"}
	o.begin(&printer{out: &out}, wire.Plan{Jobs: []wire.Job{{Name: "suite"}}}, false, false)
	o.jobBegins("suite")
	for _, line := range lines {
		o.output(line)
	}
	if end != nil {
		o.jobEnds(*end)
	}
	return o, &out
}

func TestReport(t *testing.T) {
	passes := []string{"\x16=== RUN   TestA", "    a_test.go:1: chatter", "\x16--- PASS: TestA (0.00s)"}
	fails := []string{"\x16=== RUN   TestA", "    a_test.go:1: the reason", "\x16--- FAIL: TestA (0.00s)"}
	skips := []string{"\x16=== RUN   TestA", "    a_test.go:1: not here", "\x16--- SKIP: TestA (0.00s)"}
	hangs := []string{"\x16=== RUN   TestA", "panic: test timed out"}
	for _, tt := range []struct {
		name   string
		end    *wire.End
		lines  []string
		err    error
		status int
		says   []string
	}{
		{"passed", &wire.End{}, passes, nil, 0, []string{"1 passed, 0 failed, 0 skipped"}},
		{"failed", &wire.End{Code: 1}, fails, nil, 1, []string{"the reason", "failed: TestA", "0 passed, 1 failed"}},
		{"a skip is shown with its reason", &wire.End{}, skips, nil, 0, []string{"skipped: suite TestA: not here", "1 skipped"}},
		{"out of time", &wire.End{Code: 2, TimedOut: true}, hangs, nil, 1, []string{"OUT OF TIME", "did not end: TestA", "panic: test timed out"}},
		{"the program failed, no test did", &wire.End{Code: 2}, passes, nil, 1, []string{"FAILED with exit code 2"}},
		{"the machine failed", nil, hangs, errors.New("the kernel failed: Oops"), exitMachine, []string{"THE MACHINE FAILED", "Oops", "last words", "CUT SHORT"}},
	} {
		o, shown := heard(t, "5.10", tt.end, tt.lines...)
		o.result = machine.Result{Err: tt.err, Last: []string{"last words"}}
		if got := report(o.p, []*outcome{o}, 0); got != tt.status {
			t.Errorf("%s: status %d, want %d", tt.name, got, tt.status)
		}
		for _, s := range tt.says {
			if !strings.Contains(shown.String(), s) {
				t.Errorf("%s: nothing of %q in\n%s", tt.name, s, shown)
			}
		}
		if strings.Contains(shown.String(), "chatter") {
			t.Errorf("%s: shows what a passing test said\n%s", tt.name, shown)
		}
	}
}

// checked makes the outcome of a kernel of which pillion check said that.
func checked(t *testing.T, series string, newest bool, tcx, skip string) *outcome {
	t.Helper()
	o, _ := heard(t, series, &wire.End{}, "\x16=== RUN   TestA", "    a_test.go:1: "+skip, "\x16--- SKIP: TestA (0.00s)")
	o.newest = newest
	check := &jobOutcome{name: checkJob, end: &wire.End{}}
	check.text.WriteString(`{"rows":[{"group":"kernel","what":"release","state":"ok"},` +
		`{"group":"bpf","what":"tcx","state":"` + tcx + `","detail":"not|here","needed_by":{"ebpf":"better"}}],"verdicts":[{"backend":"ebpf","usable":"usable"}]}`)
	o.jobs = append([]*jobOutcome{check}, o.jobs...)
	return o
}

func TestTable(t *testing.T) {
	file := filepath.Join(t.TempDir(), "README.md")
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	old := checked(t, "5.10", false, "missing", lacking+"MPTCP sockets: protocol not supported")
	newer := checked(t, "7.3", true, "ok", "another reason")

	write("no place")
	if err := keepTable(file, []*outcome{old}); err == nil || !strings.Contains(config.HintOf(err), tableBegins) {
		t.Errorf("no place for the table: %v", err)
	}
	write("before\n" + tableBegins + "\n" + tableEnds + "\nafter\n")
	if err := keepTable(file, []*outcome{old, newer}); err == nil {
		t.Error("an empty table was taken for a true one")
	}
	made, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"| on Linux | for | 5.10 | newest |", "| backend `ebpf` |  | yes | yes |", "| tcx | `ebpf` (better) | no: not/here | yes |",
		"| MPTCP sockets |  | no: protocol not supported | yes |", "before\n", "\nafter\n", "7.3 when this was made",
	} {
		if !strings.Contains(string(made), line) {
			t.Errorf("no line %q in\n%s", line, made)
		}
	}
	same := func(what string, outcomes ...*outcome) {
		t.Helper()
		if err := keepTable(file, outcomes); err != nil {
			now, _ := os.ReadFile(file)
			t.Errorf("%s: %v\n%s", what, err, now)
		}
		write(string(made))
	}
	same("the same run", old, newer)
	same("one kernel of it", old)
	same("the other", newer)
	same("a newer newest", old, checked(t, "7.4", true, "ok", "another reason"))
	if err := keepTable(file, []*outcome{checked(t, "5.10", false, "ok", "x")}); err == nil {
		t.Error("a stale table passes")
	}
	corrected, _ := os.ReadFile(file)
	if !strings.Contains(string(corrected), "| tcx | `ebpf` (better) | yes | yes |") {
		t.Errorf("the stale table was not corrected:\n%s", corrected)
	}
}
