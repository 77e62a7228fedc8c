// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// bootEnv is set by scripts/vm.sh. These tests boot the kernel that boots fastest, a few seconds each.
const bootEnv = "PILLION_VM_BOOT"

// TestBadDays: whatever goes wrong in a machine is reported as what it is, with the last lines, and nothing stays behind.
func TestBadDays(t *testing.T) {
	if os.Getenv(bootEnv) == "" {
		t.Skipf("boots virtual machines: make test-vm runs it (%s=1)", bootEnv)
	}
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	program := filepath.Join(t.TempDir(), "misbehave")
	if _, err := goTool(t.Context(), "build", "-o", program, module+"/test/vm/misbehave"); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args    string
		timeout string
		status  int
		says    []string
	}{
		{"exit 0", "2m", 0, []string{"about to exit", "passed"}},
		{"exit 7", "2m", 7, []string{"exit code 7"}},
		{"exit 255", "2m", 255, []string{"exit code 255"}},
		{"warn", "2m", 0, []string{"the kernel says: ", "WARNING: CPU: 0"}},
		{"oops", "2m", exitMachine, []string{"the kernel failed: ", "Oops: 0002", "about to oops"}},
		{"panic", "2m", exitMachine, []string{"the kernel failed: ", "Kernel panic - not syncing", "about to panic"}},
		{"reboot", "2m", exitMachine, []string{"without a word", "about to reboot"}},
		{"hang", "40s", 2, []string{"SIGQUIT", "time.Sleep"}},
		{"freeze", "30s", exitMachine, []string{"the machine hangs", "about to freeze"}},
	} {
		t.Run(tt.args, func(t *testing.T) {
			args := append([]string{"-kernels", "5.10", "-timeout", tt.timeout, "--", program}, strings.Fields(tt.args)...)
			status, stdout, stderr := vm(t, args...)
			if status != tt.status {
				t.Errorf("status %d, want %d", status, tt.status)
			}
			for _, s := range tt.says {
				if !strings.Contains(stdout, s) {
					t.Errorf("nothing of %q", s)
				}
			}
			if t.Failed() {
				t.Logf("%s%s", stdout, stderr)
			}
			if left, _ := filepath.Glob(filepath.Join(dir, "pillion-vm-*")); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}
