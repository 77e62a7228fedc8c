// SPDX-License-Identifier: Apache-2.0

package wire

import "testing"

func TestWordsComeBack(t *testing.T) {
	code := 3
	for _, w := range []Word{
		{Begin: "test/e2e"},
		{End: &End{Job: "test/e2e", Code: 137, TimedOut: true}},
		{Fault: "a line\nand another"},
		{Exit: &code},
	} {
		got, ok := Parse(w.Line())
		if !ok || got.Line() != w.Line() {
			t.Errorf("%q came back as %q, %v", w.Line(), got.Line(), ok)
		}
	}
	for _, line := range []string{"", "--- PASS: TestX (0.00s)", Mark + "{", "x" + Mark + "{}"} {
		if w, ok := Parse(line); ok {
			t.Errorf("%q is no word, got %+v", line, w)
		}
	}
}

// TestQEMUsOwnStatusIsNoVerdict: QEMU ends with 0 after a reboot and with 1 after an error of its own.
func TestQEMUsOwnStatusIsNoVerdict(t *testing.T) {
	for code := range 256 {
		status := 2*int(ExitByte(code)) + 1
		if status > 255 {
			t.Fatalf("code %d: status %d does not fit", code, status)
		}
		if !Agree(status, code) || Agree(0, code) || Agree(1, code) {
			t.Errorf("code %d, status %d", code, status)
		}
	}
	if Agree(2*int(ExitByte(0))+1, 1) {
		t.Error("the status of 0 is taken for 1")
	}
}
