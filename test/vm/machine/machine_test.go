// SPDX-License-Identifier: Apache-2.0

package machine

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/test/vm/wire"
)

func hear(lines ...string) *hearer {
	h := &hearer{began: time.Now(), c: Config{
		Timeout: time.Minute, Output: func(string) {}, Console: func(string) {}, Begin: func(string) {}, End: func(wire.End) {},
	}}
	for _, line := range lines {
		if kernel, ok := strings.CutPrefix(line, "kernel: "); ok {
			h.kernelLine(kernel)
		} else {
			h.guestLine(strings.TrimSuffix(line, "\n"))
		}
	}
	return h
}

func exit(code int) string { return wire.Word{Exit: &code}.Line() }

func TestVerdict(t *testing.T) {
	good := 2*int(wire.ExitByte(0)) + 1
	for _, tt := range []struct {
		name   string
		lines  []string
		status int
		err    error
		want   string // empty: the machine is to be believed
	}{
		{"passed", []string{"ok", exit(0)}, good, nil, ""},
		{"a job failed", []string{exit(7)}, 2*int(wire.ExitByte(7)) + 1, nil, ""},
		{"a warning", []string{"kernel: [  1.0] WARNING: CPU: 0 PID: 1 at net/core/dev.c:1", exit(0)}, good, nil, ""},
		{"no word", []string{"ok"}, 0, nil, "without a word"},
		{"no word, though QEMU says 0 was written", nil, good, nil, "without a word"},
		{"word and device disagree", []string{exit(0)}, 2*int(wire.ExitByte(1)) + 1, nil, "QEMU ended with"},
		{"word, then a reboot", []string{exit(0)}, 0, nil, "QEMU ended with 0"},
		{"panic", []string{"kernel: Kernel panic - not syncing: sysrq triggered crash"}, 0, nil, "the kernel failed: Kernel panic"},
		{"oops, though the tests passed", []string{"kernel: Oops: 0002 [#1] SMP", exit(0)}, good, nil, "the kernel failed: Oops"},
		{"BUG, though the tests passed", []string{"kernel: BUG: scheduling while atomic: x/1/0x2", exit(0)}, good, nil, "the kernel failed: BUG"},
		{"a test that prints BUG: is none of the kernel's", []string{"BUG: in my shoe", exit(0)}, good, nil, ""},
		{"hang", []string{"kernel: x"}, 0, errTimeout, "hangs"},
		{"the guest failed", []string{wire.Word{Fault: "mount proc"}.Line(), exit(255)}, 2*int(wire.ExitByte(255)) + 1, nil, "mount proc"},
		{"the guest speaks on the console", []string{"kernel: " + wire.Word{Fault: "no second line"}.Line()}, 0, nil, "no second line"},
		{"QEMU fails", nil, 1, errors.New("qemu: could not load kernel"), "could not load kernel"},
	} {
		err := hear(tt.lines...).verdict(tt.status, tt.err)
		switch {
		case tt.want == "" && err != nil:
			t.Errorf("%s: %v", tt.name, err)
		case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}

func TestLastLinesAreKept(t *testing.T) {
	var l lastLines
	for i := range 1000 {
		l.add(fmt.Sprint(i))
	}
	if got := l.end(); len(got) != keptLines || got[keptLines-1] != "999" {
		t.Errorf("%d lines, the last %q", len(got), got)
	}
}

func TestClean(t *testing.T) {
	if got := clean("\x1bc\x1b[?7l\x1b[2J\x02{}\x07 \r\n"); got != "\x02{}" {
		t.Errorf("%q", got)
	}
}

// TestNoQEMU: a clear error, with what to install.
func TestNoQEMU(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if err := Check(); err == nil || !strings.Contains(config.HintOf(err), "qemu-system-x86") {
		t.Errorf("got %v, hint %q", err, config.HintOf(err))
	}
}

// TestQEMUsOwnErrorIsShown: what QEMU says when it cannot start is no verdict, and nothing of the run is left.
func TestQEMUsOwnErrorIsShown(t *testing.T) {
	if err := Check(); err != nil {
		t.Skip(err)
	}
	c := hear().c
	c.Image, c.Initrd, c.Memory, c.Dir = []byte("no kernel"), "/nothing", 256, t.TempDir()
	r := Run(t.Context(), c)
	if r.Err == nil || !strings.Contains(r.Err.Error(), "nothing") && !strings.Contains(r.Err.Error(), "kernel") {
		t.Errorf("got %v, want QEMU's own words", r.Err)
	}
	if left, _ := os.ReadDir(c.Dir); len(left) > 0 {
		t.Errorf("left behind: %s", filepath.Join(c.Dir, left[0].Name()))
	}
}
