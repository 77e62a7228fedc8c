// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/pillionproxy/pillion/config"
)

// captureBench measures what it costs a connection to be captured, from set-up to bulk, beside other ways to do it.
type captureBench struct {
	pillion     string
	rounds      int
	connections int
	parallel    int
	bulk        int64    // bytes
	subjects    []string // those of captureSubjects that are measured
}

// captureSubjects are compared in this order.
var captureSubjects = []string{"direct", "redirect+relay", "capture+relay", "pillion", "rootless", "slirp4netns", "slirp4netns-64k"}

// bases are the subjects by which the others are divided, and how that is called.
var bases = []struct{ subject, called string }{{"direct", "direct"}, {"redirect+relay", "redirect"}, {"pillion", "pillion"}, {"slirp4netns", "slirp"}, {"slirp4netns-64k", "slirp-64k"}}

var families = []string{"IPv4", "IPv6"}

// key is one line of the tables.
type key struct{ subject, family string }

// result is what one round says about a key.
type result struct {
	one  sample // one connection at a time
	many sample // several at a time
	bulk sample // one connection, much at once
	// The sidecar's CPU time; 0 without a sidecar.
	cpu     float64 // for each connection of `many`, in microseconds
	bulkCPU float64 // for each gigabyte of `bulk`, in milliseconds
}

// results has one entry for each round.
type results map[key][]result

// run measures and reports.
func (b captureBench) run(ctx context.Context, stdout io.Writer) error {
	results, err := b.measure(ctx)
	if err != nil {
		return err
	}
	return b.report(stdout, results)
}

func (b captureBench) measure(ctx context.Context) (_ results, err error) {
	perFamily := (2*b.connections + 1) * (b.rounds + 1)
	if most := config.DialOutbound.Len(); perFamily > most {
		return nil, fmt.Errorf("%d connections to one destination: at most %d, so that no port of a sidecar is used twice", perFamily, most)
	}
	l, err := newLab(ctx, b.pillion, "server")
	defer func() { err = errors.Join(err, l.close()) }()
	if err != nil {
		return nil, err
	}
	for _, subject := range b.subjects {
		if err := b.prepare(ctx, l, subject); err != nil {
			return nil, fmt.Errorf("prepare %s: %w", subject, err)
		}
	}
	all := results{}
	for round := range b.rounds + 1 {
		for i := range b.subjects {
			subject := b.subjects[(i+round)%len(b.subjects)] // nobody is always the first
			for _, family := range families {
				r, err := b.round(ctx, l.hosts[subject], family)
				if err != nil {
					return nil, fmt.Errorf("%s, %s: %w", subject, family, err)
				}
				if k := (key{subject, family}); round > 0 { // the first one warms up
					all[k] = append(all[k], r)
				}
			}
		}
		fmt.Fprintf(os.Stderr, "round %d of %d done\n", round, b.rounds)
	}
	return all, nil
}

func (b captureBench) round(ctx context.Context, h *host, family string) (r result, err error) {
	if r.one, err = h.client(ctx, family, "-connections", strconv.Itoa(b.connections), "-parallel", "1"); err != nil {
		return r, err
	}
	spent, err := h.spends(func() (err error) {
		r.bulk, err = h.client(ctx, family, "-bulk", strconv.FormatInt(b.bulk, 10))
		return err
	})
	if err != nil {
		return r, err
	}
	r.bulkCPU = spent.Seconds() * 1e3 / (float64(b.bulk) / 1e9)
	spent, err = h.spends(func() (err error) {
		r.many, err = h.client(ctx, family, "-connections", strconv.Itoa(b.connections), "-parallel", strconv.Itoa(b.parallel))
		return err
	})
	r.cpu = spent.Seconds() * 1e6 / float64(b.connections)
	return r, err
}

// spends is the CPU time that the sidecar spends meanwhile.
func (h *host) spends(meanwhile func() error) (time.Duration, error) {
	before, err := settled(h.cpu)
	if err != nil {
		return 0, err
	}
	if err := meanwhile(); err != nil {
		return 0, err
	}
	after, err := settled(h.cpu)
	return after - before, err
}

// client runs the client in the app's cgroup and namespace.
func (h *host) client(ctx context.Context, family string, args ...string) (s sample, err error) {
	program := append(slices.Clone(h.through), h.lab.self, "client", "-target", fmt.Sprintf("%s:%d", h.server[family], serverPort),
		"-carried="+strconv.FormatBool(h.carried))
	out, err := h.command(ctx, "app", append(program, args...)...).Output()
	if err != nil {
		return s, explained(err)
	}
	return s, json.Unmarshal(out, &s)
}
