// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"strconv"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/proxy"
	"github.com/pillionproxy/pillion/proxy/lifecycle"
	"github.com/pillionproxy/pillion/proxy/telemetry"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func newProxyCommand(e *env) *cobra.Command {
	cfg := config.DefaultProxy()
	cmd := &cobra.Command{
		Use:   "proxy",
		Short: "Run the sidecar",
		Long: `Run the sidecar: take the connections that the capture of "pillion init" hands over, and pass them on.

It needs CAP_NET_RAW, for the backend redirect nothing at all, and gives up everything else by itself. Where the capture
reaches it, it must run as the user that init was told (--proxy-uid, 1666 by default), so that its own connections are left
alone; outside of the captured cgroup, as any user. It can be started before or after init.

By --listen auto it listens on loopback, which serves the backends ebpf and tproxy; without CAP_NET_RAW on any address,
which serves redirect alone. With the capability, --listen any serves all three; whoever connects to those ports without
being captured is reset. --listen loopback fails without the capability, where auto would go on.

At SIGTERM it stops accepting, waits for the live connections up to --drain-timeout, resets those that are left, and exits
with 0. A second SIGTERM resets them at once. Every flag can be given as an environment variable: PILLION_CONNECT_TIMEOUT
for --connect-timeout.`,
		Example: `  # as in a pod or a systemd unit: a user of its own, one capability
  setpriv --reuid 1666 --regid 1666 --clear-groups --inh-caps=-all,+net_raw --ambient-caps=-all,+net_raw pillion proxy

  # for the backend redirect: no capability at all
  setpriv --reuid 1666 --regid 1666 --clear-groups --inh-caps=-all --bounding-set=-all pillion proxy

  # as root, outside of the captured cgroup; metrics on loopback only, no admin interface
  pillion proxy --health 127.0.0.1:16020 --admin none

  # what is it carrying?
  curl -s localhost:16000/connections`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := invalid(cfg.Validate()); err != nil {
				return err
			}
			log, flush := newQueuedLogger(e.stderr, cfg.LogFormat, cfg.LogLevel)
			defer flush()
			return runProxy(cmd.Context(), cfg, log)
		},
	}
	f := cmd.Flags()
	sharedFlags(f, &cfg.Shared)
	f.Var((*slotFlag)(&cfg.Slot), "slot", "slot of the capture whose connections it takes, if there are several in this network namespace")
	f.StringVar((*string)(&cfg.Listen), "listen", string(cfg.Listen), "where the three ports are listened on: loopback, any address (for the backend redirect), or auto: loopback, any without CAP_NET_RAW")
	f.DurationVar(&cfg.ConnectTimeout, "connect-timeout", cfg.ConnectTimeout, "how long a dial may take")
	f.DurationVar(&cfg.IdleTimeout, "idle-timeout", cfg.IdleTimeout, "reset TCP connections on which nothing was passed on for so long (0: none)")
	f.DurationVar(&cfg.DrainTimeout, "drain-timeout", cfg.DrainTimeout, "how long live connections may go on after SIGTERM")
	f.IntVar(&cfg.MaxConnections, "max-connections", cfg.MaxConnections, "connections at a time; one more is reset (0: as many as the descriptor limit allows)")
	f.Var((*addrFlag)(&cfg.Admin), "admin", "loopback address of the admin interface, or none")
	f.Var((*addrFlag)(&cfg.Health), "health", "address of health probes and metrics, or none")
	f.TextVar(&cfg.LogLevel, "log-level", cfg.LogLevel, "debug, info, warn or error; connections are logged at info")
	f.StringVar(&cfg.LogFormat, "log-format", cfg.LogFormat, "json, text, or auto: text on a terminal")
	return cmd
}

func runProxy(ctx context.Context, cfg config.Proxy, log *slog.Logger) error {
	if err := lifecycle.DropPrivileges(log); err != nil {
		return err
	}
	server, err := proxy.Listen(proxy.Config{Proxy: cfg, Log: log})
	if err != nil {
		return err
	}
	ctx, stop := lifecycle.OnSignals(ctx, log, server.Close)
	defer stop()
	return server.Serve(ctx)
}

// newLogger writes to w as --log-format says.
func newLogger(w io.Writer, format string, level slog.Level) *slog.Logger {
	return newLoggerTo(w, format == "text" || format == "auto" && isTerminal(w), level)
}

func newLoggerTo(w io.Writer, text bool, level slog.Level) *slog.Logger {
	options := &slog.HandlerOptions{Level: level}
	if text {
		return slog.New(slog.NewTextHandler(w, options))
	}
	return slog.New(slog.NewJSONHandler(w, options))
}

// flushing is how long the end waits for somebody who reads our messages slowly.
const flushing = time.Second

// newQueuedLogger is newLogger for those who must not wait until somebody has read what they say, as a sidecar. flush is to be
// called at the end.
func newQueuedLogger(w io.Writer, format string, level slog.Level) (log *slog.Logger, flush func()) {
	queue := telemetry.NewQueue(w, func(lines int) {
		log.Warn("lines of this log were dropped: they were not read in time", "lines", lines)
	})
	log = newLoggerTo(queue, format == "text" || format == "auto" && isTerminal(w), level)
	return log, func() { queue.Flush(flushing) }
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// addrFlag is an address and port, or none.
type addrFlag netip.AddrPort

func (a *addrFlag) String() string {
	if p := netip.AddrPort(*a); p.IsValid() {
		return p.String()
	}
	return "none"
}

func (a *addrFlag) Set(s string) error {
	if s == "none" {
		*a = addrFlag{}
		return nil
	}
	p, err := netip.ParseAddrPort(s)
	if err != nil {
		return fmt.Errorf("%q is not ADDRESS:PORT (as 127.0.0.1:16000 or [::]:16020), nor none", s)
	}
	*a = addrFlag(p)
	return nil
}

func (a *addrFlag) Type() string { return "address:port" }

// slotFlag is a slot by its number.
type slotFlag config.Slot

func (s *slotFlag) String() string { return config.Slot(*s).String() }

func (s *slotFlag) Set(v string) error {
	n, err := strconv.ParseUint(v, 10, 8)
	if err != nil || n >= config.Slots {
		return fmt.Errorf("%q is not a slot: there are 0 to %d", v, config.Slots-1)
	}
	*s = slotFlag(n)
	return nil
}

func (s *slotFlag) Type() string { return "slot" }
