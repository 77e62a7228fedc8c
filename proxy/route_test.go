// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"testing"
	"time"

	"github.com/pillionproxy/pillion/proxy/telemetry"
)

// TestIdleTimeout: --idle-timeout ends a connection on which nothing is passed on, with a reason of its own.
func TestIdleTimeout(t *testing.T) {
	cfg := testConfig()
	cfg.IdleTimeout = 50 * time.Millisecond
	s, seen, _ := start(t, cfg)
	client := carry(t, s.routes()[telemetry.Outbound], echo(t))
	if _, err := client.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if n, err := client.Read(make([]byte, 1)); n != 1 {
		t.Fatal(err)
	}
	wantReset(t, client)
	if c := seen.next(t); c.Reason != telemetry.IdleTimeout || c.Sent != 1 || c.Received != 1 {
		t.Errorf("%+v", c)
	}
}
