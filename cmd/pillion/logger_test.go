// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/proxy/telemetry"
)

// TestLogThatNobodyReads holds up neither the sidecar nor what `run --follow` tells.
func TestLogThatNobodyReads(t *testing.T) {
	r, w := io.Pipe() // as a terminal that was stopped
	log, flush := newQueuedLogger(w, "json", slog.LevelInfo)
	seen := newRecorder(w, true)
	seen.begin()
	for range 1000 {
		log.Info("connection")
	}
	seen.Opened(telemetry.Connection{ID: 1})
	read := make(chan []byte)
	go func() {
		b, _ := io.ReadAll(r)
		read <- b
	}()
	for range 10 { // flush has a limit of its own
		flush()
		seen.w.Flush(time.Second)
	}
	w.Close()
	all := <-read
	if n := bytes.Count(all, []byte(`"msg":"connection"`)); n != 1000 || !strings.Contains(string(all), "opened") {
		t.Errorf("%d lines of 1000, and %q at the end", n, all[max(0, len(all)-100):])
	}
}
