// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"bytes"
	"slices"
	"strings"
	"sync"
	"testing"
)

// Lines is an io.Writer that keeps what a program prints, line by line, for a test to wait for. The zero value is ready.
type Lines struct {
	mu    sync.Mutex
	lines []string
	part  []byte
}

// Write takes any piece of the output.
func (l *Lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.part = append(l.part, p...)
	for {
		i := bytes.IndexByte(l.part, '\n')
		if i < 0 {
			return len(p), nil
		}
		l.lines = append(l.lines, string(l.part[:i]))
		l.part = l.part[i+1:]
	}
}

// All returns the whole lines so far.
func (l *Lines) All() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.lines)
}

// String is everything so far, the unfinished line too.
func (l *Lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(append(slices.Clone(l.lines), string(l.part)), "\n")
}

// Wait waits for a line that matches and returns it.
func (l *Lines) Wait(t testing.TB, what string, match func(line string) bool) string {
	t.Helper()
	found := ""
	ok := wait(func() bool {
		for _, line := range l.All() {
			if match(line) {
				found = line
				return true
			}
		}
		return false
	})
	if !ok {
		t.Fatalf("waited in vain for a line: %s\n--- printed so far:\n%s", what, l.String())
	}
	return found
}
