// SPDX-License-Identifier: Apache-2.0

package admin

import (
	"net/http"

	"github.com/pillionproxy/pillion/config"
)

// Health is for probes and for Prometheus: /healthz/live, /healthz/ready and /metrics.
func Health(ready func() error, metrics http.Handler) http.Handler {
	mux := http.NewServeMux()
	health(mux, ready, metrics)
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		text(w, http.StatusOK, "pillion proxy\n\n/healthz/live   does the process answer\n/healthz/ready  is it able to relay, else why not\n/metrics        Prometheus metrics")
	})
	return mux
}

func health(mux *http.ServeMux, ready func() error, metrics http.Handler) {
	mux.Handle("GET /metrics", metrics)
	mux.HandleFunc("GET /healthz/live", func(w http.ResponseWriter, _ *http.Request) {
		text(w, http.StatusOK, "live")
	})
	mux.HandleFunc("GET /healthz/ready", func(w http.ResponseWriter, _ *http.Request) {
		err := ready()
		switch hint := config.HintOf(err); {
		case err == nil:
			text(w, http.StatusOK, "ready")
		case hint != "":
			text(w, http.StatusServiceUnavailable, "not ready: %v\nhint: %s", err, hint)
		default:
			text(w, http.StatusServiceUnavailable, "not ready: %v", err)
		}
	})
}
