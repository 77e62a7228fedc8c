// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"context"
	"log/slog"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

// OnSignals returns a context that is done at the first SIGTERM or SIGINT; at the second one it calls now, which should
// end what the first one left to end by itself. stop gives the signals back their usual effect.
func OnSignals(parent context.Context, log *slog.Logger, now func()) (ctx context.Context, stop func()) {
	ctx, cancel := context.WithCancel(parent)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT)
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for n := 0; ; n++ {
			select {
			case <-quit:
				return
			case sig := <-signals:
				if n == 0 {
					log.Info("draining: no new connections; a second signal ends those that are open", "signal", sig.String())
					cancel()
				} else {
					log.Warn("ending at once", "signal", sig.String())
					now()
				}
			}
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		close(quit)
		<-done
		cancel()
	}
}
