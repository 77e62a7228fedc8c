// SPDX-License-Identifier: Apache-2.0

package machine

import (
	"regexp"
	"slices"
	"strings"
)

// Finding is something that a kernel says of itself and that no test can excuse or must not hide.
type Finding struct {
	Line  string
	Fatal bool // a bug of the kernel; else a warning, which is shown and fails nothing
}

// The words by which a kernel tells of a bug of its own: kernel/panic.c, lib/bug.c, arch/x86/kernel/dumpstack.c,
// mm/kasan, kernel/locking, kernel/hung_task.c.
var (
	fatalWords = regexp.MustCompile(`\bBUG: |\bOops: |kernel BUG at |Kernel panic - |general protection fault|Unable to handle kernel|` +
		`UBSAN: |KASAN: |blocked for more than \d+ seconds|double fault: |possible circular locking`)
	warningWords = regexp.MustCompile(`\bWARNING: |rcu.*(self-)?detected stall`)
)

// judge reads one line of the kernel's console.
func judge(line string) (Finding, bool) {
	switch {
	case fatalWords.MatchString(line):
		return Finding{line, true}, true
	case warningWords.MatchString(line):
		return Finding{line, false}, true
	}
	return Finding{}, false
}

// colour is what a firmware or a program sends to draw.
var colour = regexp.MustCompile(`\x1b(\[[0-9;?=]*[A-Za-z]|c)`)

// clean makes a line of a console readable. The marks of package wire and of test2json stay.
func clean(line string) string {
	line = colour.ReplaceAllString(line, "")
	return strings.TrimRight(strings.Map(func(r rune) rune {
		if r < ' ' && r != '\t' && r != '\x02' && r != '\x16' {
			return -1
		}
		return r
	}, line), " ")
}

// lastLines keeps the end of a console.
type lastLines struct{ lines []string }

const keptLines = 30

func (l *lastLines) add(line string) {
	if l.lines = append(l.lines, line); len(l.lines) > 2*keptLines {
		l.lines = slices.Clone(l.lines[keptLines:])
	}
}

func (l *lastLines) end() []string { return l.lines[max(0, len(l.lines)-keptLines):] }
