// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/proxy/telemetry"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type fakeBook struct{ live, recent []telemetry.Connection }

func (b fakeBook) Live() []telemetry.Connection   { return b.live }
func (b fakeBook) Recent() []telemetry.Connection { return b.recent }

func get(h http.Handler, url string) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, url, nil))
	return w
}

var noMetrics = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "some metrics") })

func TestHealth(t *testing.T) {
	var notReady error
	h := Health(func() error { return notReady }, noMetrics)
	for _, tt := range []struct {
		path   string
		ready  error
		status int
		body   string
	}{
		{"/healthz/live", errors.New("no matter"), 200, "live\n"},
		{"/healthz/ready", nil, 200, "ready\n"},
		{"/healthz/ready", errors.New("not yet"), 503, "not ready: not yet\n"},
		{"/healthz/ready", &config.Fault{Err: errors.New("captured"), Hint: "do this"}, 503, "not ready: captured\nhint: do this\n"},
		{"/metrics", nil, 200, "some metrics"},
		{"/connections", nil, 404, "404 page not found\n"},
		{"/debug/pprof/", nil, 404, "404 page not found\n"},
	} {
		notReady = tt.ready
		w := get(h, "http://10.0.0.2:16020"+tt.path)
		if w.Code != tt.status || w.Body.String() != tt.body {
			t.Errorf("%s (%v): %d %q, want %d %q", tt.path, tt.ready, w.Code, w.Body, tt.status, tt.body)
		}
	}
}

func TestAdminAnswersToLoopbackOnly(t *testing.T) {
	h := Admin(func() error { return nil }, fakeBook{}, noMetrics)
	for host, want := range map[string]int{
		"127.0.0.1:16000": 200, "localhost:16000": 200, "localhost": 200, "[::1]:16000": 200, "[::1]": 200, "127.9.9.9": 200,
		"evil.example:16000": 403, "10.0.0.2:16000": 403, "localhost.evil.example": 403, "": 403,
	} {
		for _, path := range []string{"/", "/connections", "/metrics", "/debug/pprof/cmdline", "/healthz/live"} {
			r := httptest.NewRequest(http.MethodGet, "http://x"+path, nil)
			r.Host = host
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			if w.Code != want {
				t.Errorf("%s for host %q: %d, want %d", path, host, w.Code, want)
			}
		}
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	book := fakeBook{live: make([]telemetry.Connection, maxLive+5), recent: []telemetry.Connection{}}
	for i := range book.live {
		book.live[i] = telemetry.Connection{ID: uint64(i), Source: netip.MustParseAddrPort("10.0.0.2:1"), Reason: telemetry.OK}
	}
	w := get(Admin(func() error { return nil }, book, noMetrics), "http://localhost/connections")
	var page struct {
		LiveTotal int              `json:"live_total"`
		Live      []map[string]any `json:"live"`
		Recent    []map[string]any `json:"recent"`
	}
	if err := json.Unmarshal(w.Body.Bytes(), &page); err != nil {
		t.Fatal(err)
	}
	if page.LiveTotal != maxLive+5 || len(page.Live) != maxLive || page.Recent == nil {
		t.Errorf("%d of %d listed; recent %v", len(page.Live), page.LiveTotal, page.Recent)
	}
	if first := page.Live[0]; first["id"] != 5.0 || first["source"] != "10.0.0.2:1" || first["direction"] != "outbound" || first["reason"] != "ok" {
		t.Errorf("first is %v", first)
	}
}

func TestServeStops(t *testing.T) {
	for _, addr := range []string{"127.0.0.1:0", "[::]:0"} {
		l, err := Listen(netip.MustParseAddrPort(addr))
		if err != nil {
			t.Fatal(err)
		}
		stop := Serve(l, Health(func() error { return nil }, noMetrics), slog.New(slog.DiscardHandler))
		_, port, _ := strings.Cut(strings.ReplaceAll(l.Addr().String(), "[::]", ""), ":")
		client := &http.Client{Transport: &http.Transport{}}
		r, err := client.Get("http://127.0.0.1:" + port + "/healthz/live") // over IPv4 for [::] too
		if err != nil {
			t.Fatal(err)
		}
		r.Body.Close()
		stop()
		client.CloseIdleConnections()
		if _, err := client.Get("http://127.0.0.1:" + port + "/healthz/live"); err == nil {
			t.Error("still answers after stop")
		}
	}
}
