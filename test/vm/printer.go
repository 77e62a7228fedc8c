// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"sync"
)

// printer prints whole lines, of several machines at once.
type printer struct {
	mu  sync.Mutex
	out io.Writer
}

// say prints a line of the harness itself.
func (p *printer) say(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fmt.Fprintf(p.out, format+"\n", args...)
}

// of prints a line with the name of a kernel in front.
func (p *printer) of(kernel, line string) { p.say("%-6s | %s", kernel, line) }
