// SPDX-License-Identifier: Apache-2.0

package telemetry

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	app  = netip.MustParseAddrPort("10.0.0.2:40000")
	peer = netip.MustParseAddrPort("[2001:db8::1]:443")
	ours = netip.MustParseAddrPort("10.0.0.2:20000")
)

func TestEveryReasonHasATokenOfItsOwn(t *testing.T) {
	seen := map[string]Reason{}
	for r := range reasons {
		token := r.String()
		if other, twice := seen[token]; token == "" || twice || strings.ToLower(token) != token {
			t.Errorf("reason %d: token %q (also of %d)", r, token, other)
		}
		seen[token] = r
	}
}

func TestAccessLogLine(t *testing.T) {
	var log bytes.Buffer
	b := NewBook(slog.New(slog.NewJSONHandler(&log, nil)), nil)
	r := b.Open(TCP, Outbound, app, peer)
	r.Dialled(ours, 1)
	r.Sent.Add(5)
	r.Received.Add(7)
	r.Close(UpstreamReset, errors.New("it broke"))
	b.Open(TCP, Inbound, peer, app).Close(OK, nil)

	var lines []map[string]any
	for d := json.NewDecoder(&log); ; {
		line := map[string]any{}
		if err := d.Decode(&line); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if _, ok := line["duration_ms"].(float64); !ok {
			t.Errorf("duration_ms is %v, want a number", line["duration_ms"])
		}
		for _, varies := range []string{"time", "duration_ms"} {
			delete(line, varies)
		}
		lines = append(lines, line)
	}
	want := []map[string]any{
		{
			"level": "INFO", "msg": "connection", "protocol": "tcp", "direction": "outbound",
			"source": "10.0.0.2:40000", "destination": "[2001:db8::1]:443", "upstream_source": "10.0.0.2:20000",
			"bytes_sent": 5.0, "bytes_received": 7.0, "reason": "upstream_reset", "error": "it broke",
		},
		{
			"level": "INFO", "msg": "connection", "protocol": "tcp", "direction": "inbound",
			"source": "[2001:db8::1]:443", "destination": "10.0.0.2:40000",
			"bytes_sent": 0.0, "bytes_received": 0.0, "reason": "ok",
		},
	}
	if diff := cmp.Diff(want, lines); diff != "" {
		t.Error(diff)
	}
}

func metrics(t *testing.T, b *Book) string {
	t.Helper()
	w := httptest.NewRecorder()
	b.Metrics().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if w.Code != 200 {
		t.Fatalf("%d: %s", w.Code, w.Body)
	}
	return w.Body.String()
}

func wantMetric(t *testing.T, page, line string) {
	t.Helper()
	for l := range strings.Lines(page) {
		if strings.TrimSpace(l) == line {
			return
		}
	}
	t.Errorf("no line %q in\n%s", line, page)
}

func TestMetrics(t *testing.T) {
	b := NewBook(slog.New(slog.DiscardHandler), nil)
	live := b.Open(TCP, Outbound, app, peer)
	live.Sent.Add(100)
	done := b.Open(TCP, Outbound, app, peer)
	done.Sent.Add(10)
	done.Dialled(ours, 2)
	done.Close(OK, nil)
	page := metrics(t, b)
	for _, line := range []string{
		`pillion_connections_opened_total{direction="outbound",protocol="tcp"} 2`,
		`pillion_connections_open{direction="outbound",protocol="tcp"} 1`,
		`pillion_connections_open{direction="inbound",protocol="tcp"} 0`,
		`pillion_connections_closed_total{direction="outbound",protocol="tcp",reason="ok"} 1`,
		`pillion_connections_closed_total{direction="outbound",protocol="tcp",reason="own_listener"} 0`,
		`pillion_sent_bytes_total{direction="outbound",protocol="tcp"} 110`,
		`pillion_dial_duration_seconds_count{direction="outbound"} 1`,
	} {
		wantMetric(t, page, line)
	}
	live.Close(ClientReset, io.EOF)
	wantMetric(t, metrics(t, b), `pillion_sent_bytes_total{direction="outbound",protocol="tcp"} 110`)
	if strings.Contains(page, "10.0.0.2") || strings.Contains(page, "2001:db8") {
		t.Error("the metrics name an address")
	}
}

func TestRecentIsBoundedAndInOrder(t *testing.T) {
	b := NewBook(slog.New(slog.DiscardHandler), nil)
	const more = 3 * shards * recentShard
	for range more {
		b.Open(TCP, Outbound, app, peer).Close(OK, nil)
	}
	recent := b.Recent()
	if len(recent) != shards*recentShard {
		t.Fatalf("%d connections, want %d", len(recent), shards*recentShard)
	}
	for i, c := range recent {
		if want := uint64(more - len(recent) + i + 1); c.ID != want {
			t.Fatalf("at %d: connection %d, want %d", i, c.ID, want)
		}
	}
	if live := b.Live(); len(live) != 0 {
		t.Errorf("live: %v", live)
	}
}

// counter is an Observer.
type counter struct {
	mu             sync.Mutex
	opened, closed int
}

func (c *counter) Opened(Connection) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.opened++
}

func (c *counter) Closed(conn Connection) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if conn.Closed {
		c.closed++
	}
}

func TestTotalsNeverRunBackwards(t *testing.T) {
	seen := &counter{}
	b := NewBook(slog.New(slog.DiscardHandler), seen)
	const workers, each = 8, 300
	var working sync.WaitGroup
	for range workers {
		working.Go(func() {
			for range each {
				r := b.Open(TCP, Inbound, peer, app)
				r.Sent.Add(1)
				r.Close(OK, nil)
			}
		})
	}
	done := make(chan struct{})
	go func() {
		working.Wait()
		close(done)
	}()
	last := totals{}
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		now := b.sum()[TCP]
		if now.sent[Inbound] < last.sent[Inbound] || now.opened[Inbound] < last.opened[Inbound] || now.open[Inbound] < 0 {
			t.Fatalf("from %+v to %+v", last, now)
		}
		last = now
	}
	if got := last.sent[Inbound]; got != workers*each {
		t.Errorf("%d bytes, want %d", got, workers*each)
	}
	if seen.opened != workers*each || seen.closed != workers*each {
		t.Errorf("the observer saw %d opened and %d closed, want %d", seen.opened, seen.closed, workers*each)
	}
}
