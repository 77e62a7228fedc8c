// SPDX-License-Identifier: Apache-2.0

// Package wire is what the two ends of a virtual machine's serial line agree on: the plan that the guest finds in its
// initramfs, and the lines by which it tells how the jobs went.
//
// What always holds: a line that begins with Mark is the guest's own word, and every other line is output of the job that
// was started last; the last word is Exit, and the status of the debug-exit device says the same.
package wire

import (
	"encoding/json"
	"strings"
	"time"
)

const (
	// PlanFile is the plan in the guest, as JSON.
	PlanFile = "/etc/vm.json"
	// ModuleDir has the kernel modules of the guest, as NAME.ko, uncompressed, and ModuleIndex.
	ModuleDir = "/usr/lib/vm-modules"
	// ModuleIndex names each module that may be loaded, what it needs first, and the aliases by which it is asked for.
	ModuleIndex = "index"
	// Mark begins a line of the guest's own. No test prints it.
	Mark = "\x02"
	// ExitPort is where the debug-exit device listens.
	ExitPort = 0xf4
)

// Plan is what a guest has to do, in order.
type Plan struct {
	Modules []string // to load before the first job; whatever else is asked for is loaded when it is
	Jobs    []Job
}

// Job is one program to run in the guest.
type Job struct {
	Name    string
	Path    string
	Args    []string // without the program's own name
	Dir     string
	Env     []string // beside those that every job has
	Timeout time.Duration
}

// Word is what the guest says.
type Word struct {
	Begin string // a job starts
	End   *End   // a job has ended
	Fault string // the guest itself failed
	Exit  *int   // all is done: the exit code of the first job that had one, 0 if none had
}

// End is how a job ended.
type End struct {
	Job      string
	Code     int // as a shell says it: 128+n after signal n
	TimedOut bool
}

// Line writes the word as one line.
func (w Word) Line() string {
	b, err := json.Marshal(w)
	if err != nil {
		panic(err) // strings and numbers cannot fail
	}
	return Mark + string(b) + "\n"
}

// Parse reads a word back; false if the line is none.
func Parse(line string) (w Word, ok bool) {
	text, ok := strings.CutPrefix(strings.TrimRight(line, "\r\n"), Mark)
	if !ok || json.Unmarshal([]byte(text), &w) != nil {
		return Word{}, false
	}
	return w, true
}

// ExitByte is what the guest writes to the debug-exit device for an exit code. Bit 6 is always set, so that it differs
// from any status with which QEMU ends by itself; six bits of the code fit beside it.
func ExitByte(code int) byte { return 1<<6 | byte(code)&(1<<6-1) }

// Agree reports whether the exit status of QEMU (2*byte+1, see hw/misc/debugexit.c) is the one of the code.
func Agree(status, code int) bool { return status == 2*int(ExitByte(code))+1 }
