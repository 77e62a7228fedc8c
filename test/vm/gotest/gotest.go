// SPDX-License-Identifier: Apache-2.0

// Package gotest counts what a Go test program tells while it runs with -test.v=test2json: each of its own lines then
// begins with a control character, which nothing else prints.
package gotest

import (
	"regexp"
	"strings"
)

// Verdict is how a test ended.
type Verdict string

// The verdicts. A test that began and has none was cut short.
const (
	Pass Verdict = "PASS"
	Fail Verdict = "FAIL"
	Skip Verdict = "SKIP"
)

// Counter counts the lines of one test program. The zero value is ready.
type Counter struct {
	Tests   map[string]Verdict // by full name, subtests included
	Reasons map[string]string  // of skipped tests: what they said last
	began   []string
	current string
	ended   string // the test whose verdict the last line was
	said    map[string]string
}

var (
	result   = regexp.MustCompile(`^--- (PASS|FAIL|SKIP): (\S+) \(`)
	heading  = regexp.MustCompile(`^=== (RUN|CONT|NAME|PAUSE) +(\S+)`)
	logEntry = regexp.MustCompile(`^ +\S+\.go:\d+: (.*)`)
)

// mark is the control character, see cmd/internal/test2json.
const mark = "\x16"

// Line reads one line and returns it as `go test -v` would show it.
func (c *Counter) Line(line string) string {
	if c.Tests == nil {
		c.Tests, c.Reasons, c.said = map[string]Verdict{}, map[string]string{}, map[string]string{}
	}
	c.ended = ""
	own := strings.Contains(line, mark)
	if own {
		// A test may have printed a line without its end.
		_, line, _ = strings.Cut(line, mark)
	}
	if m := heading.FindStringSubmatch(line); own && m != nil {
		c.current = m[2]
		if m[1] == "RUN" {
			c.began = append(c.began, m[2])
		}
	}
	if m := result.FindStringSubmatch(line); own && m != nil {
		c.Tests[m[2]] = Verdict(m[1])
		c.current, c.ended = m[2], m[2]
		if m[1] == string(Skip) {
			c.Reasons[m[2]] = c.said[m[2]]
		}
	}
	if m := logEntry.FindStringSubmatch(line); m != nil && c.current != "" {
		c.said[c.current] = m[1]
	}
	return line
}

// Top reports whether a name is a test of its own, no subtest.
func Top(name string) bool { return !strings.Contains(name, "/") }

// Unfinished are the tests that began and never ended.
func (c *Counter) Unfinished() (names []string) {
	for _, name := range c.began {
		if _, ended := c.Tests[name]; !ended {
			names = append(names, name)
		}
	}
	return names
}

// Count is how many tests ended with a verdict. Subtests are counted only if they were skipped: the test of which they are
// part passes all the same.
func (c *Counter) Count(v Verdict) (n int) {
	for name, got := range c.Tests {
		if got == v && (v == Skip || Top(name)) {
			n++
		}
	}
	return n
}

// Current is the test that speaks.
func (c *Counter) Current() string { return c.current }

// Ended is the test whose verdict the last line was, if it was one.
func (c *Counter) Ended() (name string, v Verdict) { return c.ended, c.Tests[c.ended] }
