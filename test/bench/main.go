// SPDX-License-Identifier: Apache-2.0

// Command bench measures what Pillion costs, beside others and in turns with them. It has two parts.
//
// `capture` is about a connection that is captured: the time of connect(), the time to the first byte of an answer,
// connections per second, the sidecar's CPU time for each, and how fast one connection carries bulk:
//
//	direct           nothing in between
//	redirect+relay   iptables REDIRECT and a minimal relay of ours (goroutines and io.Copy, which splices)
//	capture+relay    Pillion's capture and the same relay: what the capture itself costs
//	pillion          Pillion's capture and `pillion proxy`
//	rootless         `pillion run` of a user without rights
//	slirp4netns      a network stack in user space, as it starts by itself
//	slirp4netns-64k  the same with the largest packets, which it carries best: as podman starts it
//
// `proxies` is about the relay of bytes: the proxy's CPU time for each exchange, exchanges per second and their latency, the
// memory of connections, and the start:
//
//	direct           nothing in between
//	haproxy          HAProxy behind iptables REDIRECT, towards the original destination, splicing by force
//	nginx            nginx's stream module behind iptables REDIRECT, towards a fixed upstream
//	pillion-redirect `pillion proxy` behind `pillion init --backend redirect`, which is iptables REDIRECT too
//	pillion          `pillion proxy` behind the backend ebpf
//
// What always holds: each subject has a network namespace of its own, joined to one server, so that nothing is rebuilt
// between rounds; no source port is used twice in one while its last use can be felt; a figure is never read alone but as a
// ratio to a peer of the same run; and namespaces, cgroups and processes go when the run ends.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// roles are what the bench starts itself as.
var roles = map[string]func(args []string, stdout io.Writer) error{
	"client": clientRole, "server": serverRole, "relay": relayRole,
	"load-client": loadClientRole, "load-server": loadServerRole, "launch": launchRole,
}

// run plays one of the roles of the program. Without one it is the bench itself, which starts the others.
func run(args []string, stdout io.Writer) error {
	if len(args) > 0 {
		if role := roles[args[0]]; role != nil {
			return role(args[1:], stdout)
		}
	}
	c := captureBench{subjects: captureSubjects}
	p := proxiesBench{subjects: proxySubjects, cases: proxyCases}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	part := flags.String("part", "all", "what to measure: capture, proxies or all")
	flags.StringVar(&c.pillion, "pillion", "bin/pillion", "the binary to measure")
	flags.IntVar(&c.rounds, "rounds", 5, "rounds, each with every subject")
	flags.IntVar(&c.connections, "connections", 300, "capture: connections of each subject, family and case in a round")
	flags.Int64Var(&c.bulk, "bulk", 256<<20, "capture: bytes of a connection in the third case")
	flags.IntVar(&c.parallel, "parallel", 16, "capture: connections at a time in the second case")
	seconds := flags.Float64("seconds", 2, "proxies: length of a measurement")
	flags.StringVar(&p.plot, "plot", "", "proxies: a PNG to draw the CPU times into, by gnuplot")
	flags.Func("cases", "proxies: measure only these, separated by commas (default all: "+strings.Join(proxyCases, ",")+")", func(s string) (err error) {
		p.cases, err = among(proxyCases, s)
		return err
	})
	known := slices.Clone(captureSubjects)
	for _, subject := range proxySubjects {
		if !slices.Contains(known, subject) {
			known = append(known, subject)
		}
	}
	flags.Func("subjects", "measure only these, separated by commas, in the parts that have them (default all: "+strings.Join(known, ",")+")", func(s string) error {
		chosen, err := among(known, s)
		other := func(subject string) bool { return !slices.Contains(chosen, subject) }
		c.subjects = slices.DeleteFunc(slices.Clone(captureSubjects), other)
		p.subjects = slices.DeleteFunc(slices.Clone(proxySubjects), other)
		return err
	})
	if err := flags.Parse(args); err != nil {
		return err
	}
	if _, err := among([]string{"capture", "proxies", "all"}, *part); err != nil {
		return fmt.Errorf("-part: %w", err)
	}
	if c.rounds < 1 || *seconds <= 0 {
		return errors.New("-rounds, -seconds: must be positive")
	}
	if os.Geteuid() != 0 {
		return errors.New("network namespaces and BPF need root: sudo make bench")
	}
	p.pillion, p.rounds, p.window = c.pillion, c.rounds, time.Duration(*seconds*float64(time.Second))
	captures, proxies := *part != "proxies" && len(c.subjects) > 0, *part != "capture" && len(p.subjects) > 0
	if proxies {
		if err := p.check(); err != nil {
			return err
		}
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if captures {
		if err := c.run(ctx, stdout); err != nil {
			return err
		}
	}
	if proxies {
		return p.run(ctx, stdout)
	}
	return nil
}

// among reads names that are separated by commas.
func among(known []string, s string) ([]string, error) {
	names := strings.Split(s, ",")
	for _, name := range names {
		if !slices.Contains(known, name) {
			return nil, fmt.Errorf("%q is none of %s", name, strings.Join(known, ", "))
		}
	}
	return names, nil
}
