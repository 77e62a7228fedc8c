// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pillionproxy/pillion/config"
)

// vm runs a command line.
func vm(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs strings.Builder
	status = run(t.Context(), args, &out, &errs, os.Getenv)
	return status, out.String(), errs.String()
}

func TestUsage(t *testing.T) {
	dynamic := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(dynamic, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"-no-such-flag"},
		{"-kernels", ""},
		{"-kernels", "five"},
		{"-kernels", "5"},
		{"-jobs", "0"},
		{"-memory", "1"},
		{"program"},
		{"-suites", "test/e2e", "--", "program"},
		{"-table", "x", "--", "program"},
	} {
		status, _, stderr := vm(t, args...)
		if status != config.ExitUsage || !strings.Contains(stderr, "hint: ") {
			t.Errorf("%q: status %d, want %d and a hint\n%s", args, status, config.ExitUsage, stderr)
		}
	}
	status, stdout, _ := vm(t, "-h")
	if status != 0 || !strings.Contains(stdout, "go run ./test/vm -kernels 5.10,6.12 -- ./") {
		t.Errorf("-h: status %d\n%s", status, stdout)
	}
	if err := checkStatic(dynamic); err == nil || config.ExitOf(err) != config.ExitUsage {
		t.Errorf("a script was taken for a static program: %v", err)
	}
	if err := checkStatic(filepath.Join(t.TempDir(), "nothing")); err == nil {
		t.Error("a program that is not there was taken")
	}
}

// TestNewSuitesAreFoundByThemselves: by what they import, themselves or their tests.
func TestNewSuitesAreFoundByThemselves(t *testing.T) {
	list := strings.Join([]string{
		module + "/bpf|/d/bpf|github.com/cilium/ebpf fmt",
		module + "/config|/d/config|fmt testing",
		module + "/test/new|/d/new|testing " + module + "/test/testnet",
		module + "/test/vm|/d/vm|golang.org/x/sys/unix",
		module + "/test/vm/machine|/d/machine|golang.org/x/sys/unix",
		"",
	}, "\n")
	want := []suite{{name: "bpf", dir: "/d/bpf"}, {name: "test/new", dir: "/d/new"}}
	if diff := cmp.Diff(want, parseSuites(list), cmp.AllowUnexported(suite{})); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	suites, err := findSuites(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range suites {
		names = append(names, s.name)
	}
	for _, known := range []string{"redirect/ebpf", "redirect/cgroup", "redirect/check", "test/e2e", "test/testnet"} {
		if !strings.Contains(strings.Join(names, " ")+" ", known+" ") {
			t.Errorf("%s is not among the suites %v", known, names)
		}
	}
}

// TestWithoutQEMU: nothing is downloaded before that is known.
func TestWithoutQEMU(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	cache := filepath.Join(t.TempDir(), "cache")
	status, _, stderr := vm(t, "-cache", cache, "-kernels", "5.10")
	if status != config.ExitUnavailable || !strings.Contains(stderr, "qemu-system-x86") {
		t.Errorf("status %d\n%s", status, stderr)
	}
	if _, err := os.Stat(cache); err == nil {
		t.Error("a cache was made")
	}
}

// TestPlanLeavesTimeToSayWhereItHangs: first the test program's own limit, then the job's, then the machine's.
func TestPlanLeavesTimeToSayWhereItHangs(t *testing.T) {
	o, err := parse([]string{"-table", "x"}, os.Stdout)
	if err != nil {
		t.Fatal(err)
	}
	plan := o.plan([]suite{{name: "test/e2e"}})
	if len(plan.Jobs) != 2 || plan.Jobs[0].Name != checkJob {
		t.Fatalf("jobs %+v", plan.Jobs)
	}
	if j := plan.Jobs[1]; j.Timeout >= o.timeout || !strings.Contains(strings.Join(j.Args, " "), "-test.short") {
		t.Errorf("job %+v of a machine that has %s", j, o.timeout)
	}
}
