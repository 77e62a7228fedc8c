// SPDX-License-Identifier: Apache-2.0

package telemetry

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"
)

// TestQueueOfAReaderThatReadsNothing: nobody waits for it; what fits is there in the end, in order, and the rest is counted.
func TestQueueOfAReaderThatReadsNothing(t *testing.T) {
	r, w := io.Pipe()
	lost := 0
	var q *Queue
	q = NewQueue(w, func(lines int) {
		lost += lines
		fmt.Fprintf(q, "%d lost\n", lines)
	})
	const lines = 100_000
	rest := strings.Repeat("x", 40)
	for i := range lines {
		fmt.Fprintf(q, "%d %s\n", i, rest)
	}
	q.Flush(time.Millisecond)
	got := make(chan []byte)
	go func() {
		b, _ := io.ReadAll(r)
		got <- b
	}()
	q.Flush(time.Minute)
	w.Close()
	seen, told := 0, 0
	for line := range strings.Lines(string(<-got)) {
		var n int
		if _, err := fmt.Sscanf(line, "%d lost\n", &n); err == nil && strings.HasSuffix(line, "lost\n") {
			told += n
			continue
		}
		if want := fmt.Sprintf("%d %s\n", seen, rest); line != want {
			t.Fatalf("line %q, want %q", line, want)
		}
		seen++
	}
	if lost == 0 || told != lost || seen+lost != lines {
		t.Errorf("%d lines arrived, %d were lost, %d told of; want %d in all", seen, lost, told, lines)
	}
}

// TestQueueIsFlushed: what was written before is there afterwards, again and again.
func TestQueueIsFlushed(t *testing.T) {
	var to bytes.Buffer
	q := NewQueue(&to, func(int) { t.Error("lost") })
	want := ""
	for i := range 1000 {
		line := fmt.Sprintf("line %d\n", i)
		want += line
		_, _ = io.WriteString(q, line)
		if i%10 == 0 {
			if q.Flush(time.Minute); to.String() != want {
				t.Fatalf("%q, want %q", to.String(), want)
			}
		}
	}
	q.Flush(time.Minute)
}
