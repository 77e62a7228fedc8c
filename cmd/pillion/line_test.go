// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
)

// newLines is both ends of a line.
func newLines(t *testing.T) (a, b *line) {
	t.Helper()
	a, file, err := newLine()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	conn, err := net.FileConn(file)
	if err != nil {
		t.Fatal(err)
	}
	b = &line{conn.(*net.UnixConn)}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// TestLineCarries short messages, and those that are longer than a packet, each with the files beside it.
func TestLineCarries(t *testing.T) {
	a, b := newLines(t)
	for _, size := range []int{0, 100, packetBytes, 1 << 20} {
		file, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		sent := strings.Repeat("x", size)
		if err := a.send(sent, []*os.File{file}); err != nil {
			t.Fatal(err)
		}
		var got string
		files, err := b.receive(&got)
		if err != nil || got != sent || len(files) != 1 {
			t.Fatalf("%d bytes and %d files, %v; want %d, and one", len(got), len(files), err, size)
		}
		closeAll(files)
	}
}

// TestLineEnds: that the other end is gone is an end, whether it had read everything or not.
func TestLineEnds(t *testing.T) {
	for name, unread := range map[string]bool{"with everything read": false, "with something unread": true} {
		t.Run(name, func(t *testing.T) {
			a, b := newLines(t)
			if unread {
				if err := b.send("never read", nil); err != nil {
					t.Fatal(err)
				}
			}
			a.Close()
			var got string
			if _, err := b.receive(&got); !errors.Is(err, io.EOF) {
				t.Errorf("%v, want %v", err, io.EOF)
			}
		})
	}
}
