// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"
)

// proxiesBench compares Pillion's relay of bytes with those of tuned peers, by what each exchange costs the proxy.
type proxiesBench struct {
	pillion  string
	rounds   int
	window   time.Duration // of one measurement
	subjects []string      // those of proxySubjects that are measured
	cases    []string      // those of proxyCases
	plot     string        // a file, or none
}

const (
	direct          = "direct"
	haproxy         = "haproxy"
	nginx           = "nginx"
	pillionRedirect = "pillion-redirect"
	pillion         = "pillion"
)

// proxySubjects are compared in this order.
var proxySubjects = []string{direct, haproxy, nginx, pillionRedirect, pillion}

const (
	small = "small" // 64 connections are kept, 100 bytes to and 128 bytes fro
	bulk  = "bulk"  // 4 connections are kept, answers of 16 MiB
	fresh = "new"   // a connection for each exchange of small, 16 at a time; the server closes first
	idle  = "idle"  // connections that had one exchange
	start = "start" // from the execution of the proxy to the first answer
)

var proxyCases = []string{small, bulk, fresh, idle, start}

const (
	bulkAnswer = 16 << 20
	starts     = 10
)

// held are the connections of idle.
var held = []int{1000, 8000}

// loads are the clients of the cases with a window. The warm-up has a proxy touch the memory that it will use.
var loads = map[string][]string{
	small: {"-parallel", "64", "-warmup", "100"},
	bulk:  {"-parallel", "4", "-warmup", "3", "-answer", strconv.Itoa(bulkAnswer)},
	fresh: {"-parallel", "16", "-warmup", "100", "-fresh"},
}

// cell is a figure of a subject.
type cell struct{ kase, figure, subject string }

// proxyResults are the values of each round, and what was sent twice in all of them.
type proxyResults struct {
	values map[cell][]float64
	resent map[[2]string]retransmits // by case and subject
}

// run measures, reports and plots.
func (b proxiesBench) run(ctx context.Context, stdout io.Writer) error {
	results, err := b.measure(ctx)
	if err != nil {
		return err
	}
	if err := b.report(stdout, results); err != nil || b.plot == "" {
		return err
	}
	return b.draw(ctx, results)
}

// missing adds to the error of a search for a program how to get it.
func missing(err error) error {
	if err != nil {
		return fmt.Errorf("%w: scripts/deps.sh bench installs it", err)
	}
	return nil
}

// check finds what would fail later.
func (b proxiesBench) check() error {
	if err := raiseOpenFiles(); err != nil {
		return err
	}
	limit, err := openFiles()
	if err != nil {
		return err
	}
	if need := uint64(2*slices.Max(held) + 2*haproxyPipes + spareFiles); slices.Contains(b.cases, idle) && limit < need {
		return fmt.Errorf("idle: a proxy needs %d file descriptors for %d connections, and the hard limit is %d: raise it (ulimit -Hn), or leave the case out (-cases)",
			need, slices.Max(held), limit)
	}
	if b.plot == "" {
		return nil
	}
	if !slices.Contains(b.subjects, haproxy) {
		return fmt.Errorf("-plot: the plot is in relation to %s, which is not measured", haproxy)
	}
	_, err = exec.LookPath("gnuplot")
	return missing(err)
}

func (b proxiesBench) measure(ctx context.Context) (_ proxyResults, err error) {
	all := proxyResults{map[cell][]float64{}, map[[2]string]retransmits{}}
	l, err := newLab(ctx, b.pillion, "load-server")
	defer func() { err = errors.Join(err, l.close()) }()
	if err != nil {
		return all, err
	}
	hosts := map[string]*proxied{}
	for _, subject := range b.subjects {
		if hosts[subject], err = b.prepare(ctx, l, subject); err != nil {
			return all, fmt.Errorf("prepare %s: %w", subject, err)
		}
	}
	for round := range b.rounds {
		for _, kase := range b.cases {
			fmt.Fprintf(os.Stderr, "round %d of %d, %s:", round+1, b.rounds, kase)
			err := b.turns(kase, round, func(subject string) error {
				fmt.Fprint(os.Stderr, " ", subject)
				return hosts[subject].measure(ctx, b, kase, subject, all)
			})
			fmt.Fprintln(os.Stderr)
			if err != nil {
				return all, err
			}
		}
	}
	return all, nil
}

// turns calls measure for each subject, as often as the case is measured in a round.
func (b proxiesBench) turns(kase string, round int, measure func(subject string) error) error {
	for range b.repeats(kase, round) {
		for i := range b.subjects {
			subject := b.subjects[(i+round)%len(b.subjects)] // nobody is always the first
			if subject == direct && loads[kase] == nil {
				continue // no proxy: no memory and no start
			}
			if err := measure(subject); err != nil {
				return fmt.Errorf("%s, %s: %w", kase, subject, err)
			}
		}
	}
	return nil
}

// repeats is how often a case is measured in a round. All starts are in as many rounds as there are.
func (b proxiesBench) repeats(kase string, round int) int {
	if kase == start {
		return starts*(round+1)/b.rounds - starts*round/b.rounds
	}
	return 1
}

// measure measures a case once, with a proxy that was just started: nothing of another case is in its memory.
func (p *proxied) measure(ctx context.Context, b proxiesBench, kase, subject string, all proxyResults) (err error) {
	record := func(figure string, value float64) {
		c := cell{kase, figure, subject}
		all.values[c] = append(all.values[c], value)
	}
	running := ctx
	defer func() {
		if err != nil {
			err = p.explain(running, err)
		}
	}()
	if kase == start {
		took, err := p.startup(ctx)
		if err == nil {
			record(figureStart, took)
		}
		return err
	}
	var r *process
	if r, running, err = p.start(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.stop()) }()
	if err := r.listening(running); err != nil {
		return err
	}
	if kase == idle {
		return p.idle(running, record)
	}
	resent, err := p.loaded(running, b.window, kase, record)
	key := [2]string{kase, subject}
	all.resent[key] = all.resent[key].plus(resent)
	return err
}

// explain puts what was behind an error in its place, the proxy's end or a signal to us, and adds what was printed.
func (p *proxied) explain(running context.Context, err error) error {
	if cause := context.Cause(running); cause != nil && !errors.Is(cause, errStopped) {
		err = cause
	}
	for _, log := range []string{p.log, p.lab.server.log} {
		if text, _ := os.ReadFile(log); len(text) > 0 {
			err = fmt.Errorf("%w\n%s:\n%s", err, log, strings.TrimSpace(string(text)))
		}
	}
	return err
}

// loaded measures the exchanges of a window, and the proxy's CPU time until it is at rest again.
func (p *proxied) loaded(ctx context.Context, window time.Duration, kase string, record func(string, float64)) (resent retransmits, err error) {
	client, err := p.load(ctx, append([]string{"-window", window.String()}, loads[kase]...)...)
	if err != nil {
		return resent, err
	}
	defer func() { err = errors.Join(err, client.end()) }()
	if _, err := client.sample(); err != nil { // it is warm
		return resent, err
	}
	cpu, err := settled(p.cgroupCPU)
	if err != nil {
		return resent, err
	}
	before, err := p.retransmitted(client)
	if err != nil {
		return resent, err
	}
	if err := client.proceed(); err != nil {
		return resent, err
	}
	s, err := client.sample()
	if err != nil {
		return resent, err
	}
	after, err := p.retransmitted(client)
	if err != nil {
		return resent, err
	}
	spent, err := settled(p.cgroupCPU)
	if err != nil {
		return resent, err
	}
	spent -= cpu
	if kase == bulk {
		gib := float64(s.Exchanges) * bulkAnswer / (1 << 30)
		record(figureBulkCPU, spent.Seconds()/gib)
		record(figureBulkRate, gib/s.Seconds)
	} else {
		record(figureCPU, spent.Seconds()/float64(s.Exchanges)*1e5)
		record(figureRate, float64(s.Exchanges)/s.Seconds)
	}
	record(figureP50, s.P50)
	record(figureP99, s.P99)
	return after.minus(before), nil
}

// retransmitted counts what was sent twice on either side.
func (p *proxied) retransmitted(client *loading) (retransmits, error) {
	here, err := retransmitted(client.cmd.Process.Pid)
	if err != nil {
		return here, err
	}
	there, err := retransmitted(p.lab.serving.Process.Pid)
	return here.plus(there), err
}

// idle measures memory, before there are connections and with them.
func (p *proxied) idle(ctx context.Context, record func(string, float64)) (err error) {
	if _, err := settled(p.cgroupCPU); err != nil {
		return err
	}
	empty, err := p.memory()
	if err != nil {
		return err
	}
	record(figureIdleAll, empty.all)
	record(figureIdleAnonymous, empty.anonymous)
	counts := make([]string, len(held))
	for i, n := range held {
		counts[i] = strconv.Itoa(n)
	}
	client, err := p.load(ctx, "-parallel", "64", "-hold", strings.Join(counts, ","))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, client.end()) }()
	for i, n := range held {
		if i > 0 {
			if err := client.proceed(); err != nil {
				return err
			}
		}
		if _, err := client.sample(); err != nil {
			return err
		}
		if _, err := settled(p.cgroupCPU); err != nil {
			return err
		}
		full, err := p.memory()
		if err != nil {
			return err
		}
		record(figureHeld(n), (full.anonymous-empty.anonymous)/float64(n))
	}
	return nil
}

// startup is the time from the execution of the proxy to the first answer that came through it, in milliseconds.
func (p *proxied) startup(ctx context.Context) (ms float64, err error) {
	client, err := p.load(ctx, "-poll")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, client.end()) }()
	if _, err := client.sample(); err != nil { // it runs
		return 0, err
	}
	if err := client.proceed(); err != nil {
		return 0, err
	}
	r, running, err := p.start(ctx)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, r.stop()) }()
	s, err := client.sample()
	if err != nil {
		return 0, errors.Join(context.Cause(running), err)
	}
	return float64(s.Until-r.began) / float64(time.Millisecond), nil
}
