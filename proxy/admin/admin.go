// SPDX-License-Identifier: Apache-2.0

// Package admin serves what people and their tools ask the proxy over HTTP: its health and metrics, for anyone who may
// reach the port, and, on loopback alone, what it carries and what it is busy with.
//
// What always holds: nothing here changes anything; every answer is bounded; and what names an address of a connection is
// served on loopback only, to requests that were addressed to loopback (a web page that a browser on this host shows
// cannot read it by a DNS name of its own).
package admin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

const (
	readHeaderTimeout = 5 * time.Second
	idleTimeout       = 2 * time.Minute
	maxHeaderBytes    = 16 << 10
)

// Listen opens a listener. On a host without IPv6, the wildcard address [::] stands for 0.0.0.0.
func Listen(addr netip.AddrPort) (net.Listener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // an MPTCP listener cannot be told from the app's by the capture
	l, err := lc.Listen(context.Background(), "tcp", addr.String())
	if addr.Addr() == netip.IPv6Unspecified() && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL)) {
		return lc.Listen(context.Background(), "tcp4", netip.AddrPortFrom(netip.IPv4Unspecified(), addr.Port()).String())
	}
	return l, err
}

// Serve serves the handler on a goroutine of its own, and takes the listener over. stop ends it, without waiting for
// requests, and waits for the goroutine.
func Serve(l net.Listener, h http.Handler, log *slog.Logger) (stop func()) {
	server := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: readHeaderTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.Error("http server ended", "address", l.Addr().String(), "error", err)
		}
	}()
	return func() {
		_ = server.Close() // closes the listener and every connection; what it reports is theirs
		<-done
	}
}

// text answers with a line of text.
func text(w http.ResponseWriter, status int, format string, args ...any) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	fmt.Fprintf(w, format+"\n", args...) // an error means that the client is gone
}
