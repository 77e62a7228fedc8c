// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"encoding/json"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"

	"github.com/pillionproxy/pillion/proxy/telemetry"
)

// maxLive is how many live connections /connections lists; live_total tells how many there are.
const maxLive = 1000

// Book is what Admin shows.
type Book interface {
	Live() []telemetry.Connection
	Recent() []telemetry.Connection
}

// Admin is for people on this host: what Health has, /connections, and /debug/pprof/.
func Admin(ready func() error, book Book, metrics http.Handler) http.Handler {
	mux := http.NewServeMux()
	health(mux, ready, metrics)
	mux.HandleFunc("GET /connections", func(w http.ResponseWriter, _ *http.Request) { connections(w, book) })
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		text(w, http.StatusOK, `pillion proxy: admin

/connections    the live connections and the last ones that ended, as JSON
/healthz/live   does the process answer
/healthz/ready  is it able to relay, else why not
/metrics        Prometheus metrics
/debug/pprof/   profiles of the process`)
	})
	return localOnly(mux)
}

// localOnly refuses requests for names other than loopback's.
func localOnly(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host := r.Host
		if h, _, err := net.SplitHostPort(host); err == nil {
			host = h
		}
		if addr, err := netip.ParseAddr(trimBrackets(host)); host != "localhost" && (err != nil || !addr.IsLoopback()) {
			text(w, http.StatusForbidden, "the admin interface answers to loopback addresses and localhost only")
			return
		}
		h.ServeHTTP(w, r)
	})
}

func trimBrackets(host string) string {
	if n := len(host); n > 1 && host[0] == '[' && host[n-1] == ']' {
		return host[1 : n-1]
	}
	return host
}

func connections(w http.ResponseWriter, book Book) {
	live, recent := book.Live(), book.Recent()
	page := struct {
		LiveTotal int                    `json:"live_total"`
		Live      []telemetry.Connection `json:"live"`
		Recent    []telemetry.Connection `json:"recent"`
	}{len(live), live[max(0, len(live)-maxLive):], recent}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	_ = e.Encode(page) // an error means that the client is gone
}
