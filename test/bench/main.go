// SPDX-License-Identifier: Apache-2.0

// Command bench measures what it costs a connection to be captured: the time of connect(), the time to the first byte of
// an answer, connections per second, the sidecar's CPU time for each, and how fast one connection carries bulk. It compares, in one run and in turns:
//
//	direct           nothing in between
//	redirect+relay   iptables REDIRECT and a minimal relay of ours (goroutines and io.Copy, which splices)
//	capture+relay    Pillion's capture and the same relay: what the capture itself costs
//	pillion          Pillion's capture and `pillion proxy`
//	rootless         `pillion run` of a user without rights
//	slirp4netns      a network stack in user space, as it starts by itself
//	slirp4netns-64k  the same with the largest packets, which it carries best: as podman starts it
//
// What always holds: each subject has a network namespace of its own, joined to one server, so that nothing is rebuilt
// between rounds; no source port is used twice in one; a figure is never read alone but as a ratio to `direct`,
// `redirect+relay`, `pillion` or the stacks in user space of the same round; and namespaces, cgroups and processes go when the run ends.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
)

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// run plays one of the roles of the program. Without one it is the bench itself, which starts the others.
func run(args []string, stdout io.Writer) error {
	role := ""
	if len(args) > 0 && slices.Contains([]string{"client", "server", "relay"}, args[0]) {
		role, args = args[0], args[1:]
	}
	flags := flag.NewFlagSet("bench "+role, flag.ContinueOnError)
	switch role {
	case "client":
		var c client
		flags.Int64Var(&c.bulk, "bulk", 0, "instead, let one connection carry so many bytes")
		flags.StringVar(&c.target, "target", "", "address and port of the server")
		flags.IntVar(&c.connections, "connections", 1, "how many connections to make")
		flags.IntVar(&c.parallel, "parallel", 1, "how many at a time")
		flags.BoolVar(&c.carried, "carried", false, "fail unless every connection comes by a sidecar; else fail if one does")
		if err := flags.Parse(args); err != nil {
			return err
		}
		result, err := c.run()
		if err != nil {
			return err
		}
		return json.NewEncoder(stdout).Encode(result)
	case "server":
		return serve(stdout)
	case "relay":
		transparent := flags.Bool("transparent", false, "behind Pillion's capture; else behind REDIRECT")
		if err := flags.Parse(args); err != nil {
			return err
		}
		return relay(*transparent, stdout)
	}

	var b bench
	flags.StringVar(&b.pillion, "pillion", "bin/pillion", "the binary to measure")
	flags.IntVar(&b.rounds, "rounds", 5, "rounds, each with every subject")
	flags.IntVar(&b.connections, "connections", 300, "connections of each subject, family and case in a round")
	flags.Int64Var(&b.bulk, "bulk", 256<<20, "bytes of a connection in the third case")
	flags.IntVar(&b.parallel, "parallel", 16, "connections at a time in the second case")
	b.subjects = subjects
	flags.Func("subjects", "measure only these, separated by commas (default all: "+strings.Join(subjects, ",")+")", func(s string) error {
		b.subjects = strings.Split(s, ",")
		for _, subject := range b.subjects {
			if !slices.Contains(subjects, subject) {
				return fmt.Errorf("%q is none of %v", subject, subjects)
			}
		}
		return nil
	})
	if err := flags.Parse(args); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	results, err := b.measure(ctx)
	if err != nil {
		return err
	}
	return b.report(stdout, results)
}
