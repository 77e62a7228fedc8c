// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"log/slog"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/proxy"
	"github.com/pillionproxy/pillion/redirect/rootless"
	"github.com/spf13/pflag"
)

// rootlessPorts are those of the listeners in the namespace of the command.
var rootlessPorts = rootless.Ports{TCP: config.PortOutbound, UDP: config.PortOutbound}

// runRootless is runCommand for everyone: it captures a namespace of the command's own, in which this user has every right.
func runRootless(e *env, o runOptions, args []string, flags *pflag.FlagSet) error {
	for _, name := range notRootless() {
		if flags.Changed(name) {
			return &config.Fault{
				Err:  fmt.Errorf("--%s: the backend rootless captures all that the command does, by itself", name),
				Hint: "leave the flag out, or run it with sudo, by the backend ebpf",
				Exit: config.ExitUsage,
			}
		}
	}
	path, err := lookCommand(args[0])
	if err != nil {
		return err
	}
	host, err := rootless.Look()
	if err != nil {
		return err
	}
	if o.dryRun {
		return rootless.MakePlan(host, rootlessPorts).WriteText(e.stdout)
	}
	log := slog.New(slog.DiscardHandler)
	if o.verbose {
		var flush func()
		log, flush = newQueuedLogger(e.stderr, "text", slog.LevelInfo)
		defer flush()
	}
	kept, err := keep(e, o.mapRoot)
	if err != nil {
		return err
	}
	defer kept.close()
	tcp, datagrams, err := kept.capture(host)
	if err != nil {
		return err
	}

	seen := newRecorder(e.stderr, o.report.follow)
	cfg := proxy.Config{Proxy: o.proxy, Log: log, Observer: seen, Outbound: tcp, Datagrams: proxy.Datagrams{Listeners: datagrams, Side: kept}}
	cfg.DrainTimeout = drainAfterCommand
	server, err := proxy.Listen(cfg)
	if err != nil {
		return err
	}
	stop := serveInside(server, log)
	defer stop()
	published := newPublisher(server, kept, e.stderr)
	defer published.close()
	if err := published.open(o.publish); err != nil {
		return err
	}

	seen.begin()
	status, left, err := kept.run(keepStart{Path: path, Args: args, Wait: o.waitAll, Listening: o.allPorts}, published.update)
	published.close()
	if err != nil {
		return err
	}
	if left > 0 {
		fmt.Fprintf(e.stderr, "pillion: ended %d processes that the command left in the background (--wait-all waits for them)\n", left)
	}
	stop()
	if err := o.report.write(e.stderr, seen.connections()); err != nil {
		return err
	}
	return exitStatus(status)
}

// notRootless are the flags of run that choose what is captured, and where.
func notRootless() []string {
	names := []string{"netns", "no-verify"}
	var p config.Capture
	f := pflag.NewFlagSet("", pflag.ContinueOnError)
	policyFlags(f, &p)
	selectionFlags(f, &p.Selection)
	f.VisitAll(func(f *pflag.Flag) { names = append(names, f.Name) })
	return names
}
