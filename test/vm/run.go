// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/test/vm/debian"
	"github.com/pillionproxy/pillion/test/vm/kernel"
	"github.com/pillionproxy/pillion/test/vm/machine"
	"github.com/pillionproxy/pillion/test/vm/wire"
)

var seriesName = regexp.MustCompile(`^(\d+\.\d+|` + debian.Newest + `)\??$`)

// do does what the flags say and returns the exit status.
func (o options) do(ctx context.Context, p *printer, getenv func(string) string) (int, error) {
	began := time.Now()
	cache, err := o.cacheDir()
	if err != nil {
		return 0, err
	}
	if !o.list {
		if err := machine.Check(); err != nil {
			return 0, unavailable(err)
		}
	}
	if len(o.argv) > 0 {
		if err := checkStatic(o.argv[0]); err != nil {
			return 0, err
		}
	}
	store, err := debian.Open(ctx, cache, debian.FindMirrors(ctx, getenv), o.refresh, p.say)
	if err != nil {
		return 0, unavailable(err)
	}
	defer store.Close()
	var suites []suite
	if len(o.argv) == 0 {
		if suites, err = o.pickSuites(ctx); err != nil {
			return 0, err
		}
	}
	if o.list {
		for _, r := range store.Releases() {
			p.say("kernel %-6s %s", r.Series, r.Version)
		}
		for _, s := range suites {
			p.say("suite  %s", s.name)
		}
		return 0, nil
	}
	work, err := os.MkdirTemp("", "pillion-vm-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(work)

	c := content{suites: suites, files: o.files}
	if len(o.argv) > 0 {
		c.binary = o.argv[0]
	}
	var outcomes []*outcome
	var missing []error
	common := filepath.Join(work, "common")
	// Compiling and fetching wait for different things.
	var wg sync.WaitGroup
	var buildErr error
	wg.Go(func() {
		p.say("compiling %d suites", len(suites))
		if c.guest, c.pillion, buildErr = build(ctx, work, suites); buildErr != nil {
			return
		}
		if len(suites) == 0 {
			c.pillion = ""
		}
		if len(o.packages) > 0 {
			if c.node, buildErr = store.Unpack(ctx, o.packages, o.refresh); buildErr != nil {
				return
			}
		}
		buildErr = c.writeCommon(common, o.programs)
		p.say("compiled in %.1f s", time.Since(began).Seconds())
	})
	for _, want := range o.kernels {
		series, optional := strings.CutSuffix(want, "?")
		out, err := fetch(ctx, store, series)
		if err != nil && ctx.Err() == nil {
			p.say("NO KERNEL %s: %v", series, err)
			if hint := config.HintOf(err); hint != "" {
				p.say("  hint: %s", hint)
			}
			if !optional {
				missing = append(missing, fmt.Errorf("kernel %s, which was asked for, cannot be had", series))
			}
			continue
		}
		if err == nil && !slices.ContainsFunc(outcomes, func(o *outcome) bool { return o.series == out.series }) {
			outcomes = append(outcomes, out)
		}
	}
	wg.Wait()
	if err := errors.Join(buildErr, ctx.Err()); err != nil {
		return 0, err
	}
	o.boot(ctx, p, outcomes, suites, common, work)
	if ctx.Err() != nil {
		return 0, fmt.Errorf("interrupted: %w", ctx.Err())
	}
	status := report(p, outcomes, time.Since(began))
	if o.table != "" && status == 0 && len(missing) == 0 {
		if err := keepTable(o.table, outcomes); err != nil {
			return 0, err
		}
	}
	if len(missing) > 0 {
		return 0, unavailable(errors.Join(missing...))
	}
	return status, nil
}

// unavailable gives an error the exit status of what cannot be had.
func unavailable(err error) error {
	return &config.Fault{Err: err, Exit: config.ExitUnavailable, Hint: config.HintOf(err)}
}

// checkStatic refuses a program that the guest could not start.
func checkStatic(file string) error {
	f, err := elf.Open(file)
	if err != nil {
		return &config.Fault{Err: fmt.Errorf("program %s: %w", file, err), Hint: "it takes a program of amd64, statically linked: CGO_ENABLED=0 go test -c", Exit: config.ExitUsage}
	}
	defer f.Close()
	dynamic := slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP })
	if f.Machine != elf.EM_X86_64 || dynamic {
		return &config.Fault{Err: fmt.Errorf("program %s: not a static program of amd64", file), Hint: "for a Go program: CGO_ENABLED=0 GOARCH=amd64", Exit: config.ExitUsage}
	}
	return nil
}

// pickSuites finds the suites and takes those that were asked for.
func (o options) pickSuites(ctx context.Context) ([]suite, error) {
	all, err := findSuites(ctx)
	if err != nil || len(o.suites) == 0 {
		return all, err
	}
	var names []string
	var picked []suite
	for _, s := range all {
		names = append(names, s.name)
		if slices.Contains(o.suites, s.name) {
			picked = append(picked, s)
		}
	}
	for _, want := range o.suites {
		if !slices.Contains(names, want) {
			return nil, usageError("suite %q: there is none; there are %s", want, strings.Join(names, " "))
		}
	}
	return picked, nil
}

// fetch gets a kernel's files.
func fetch(ctx context.Context, store *debian.Store, series string) (*outcome, error) {
	r, err := store.Find(series)
	if err != nil {
		return nil, err
	}
	files, err := store.Fetch(ctx, r)
	if err != nil {
		return nil, err
	}
	return &outcome{series: r.Series, version: r.Version, newest: series == debian.Newest, files: files}, nil
}

// boot runs a machine for each kernel, a few at a time, the newest first: those take longest.
func (o options) boot(ctx context.Context, p *printer, outcomes []*outcome, suites []suite, common, work string) {
	free := make(chan struct{}, o.jobs)
	var wg sync.WaitGroup
	for _, out := range slices.Backward(outcomes) {
		free <- struct{}{}
		wg.Go(func() {
			defer func() { <-free }()
			if ctx.Err() == nil {
				o.bootOne(ctx, p, out, suites, common, filepath.Join(work, out.series))
			}
		})
	}
	wg.Wait()
}

func (o options) bootOne(ctx context.Context, p *printer, out *outcome, suites []suite, common, dir string) {
	plan := o.plan(suites)
	out.begin(p, plan, o.verbose, len(o.argv) > 0)
	k, err := kernel.Read(out.files...)
	initrd := filepath.Join(dir, "initrd")
	if err == nil {
		err = os.Mkdir(dir, 0o700)
	}
	if err == nil {
		err = writeInitrd(initrd, common, k, plan)
	}
	if err != nil {
		out.result.Err = err
		return
	}
	defer os.RemoveAll(dir)
	p.of(out.series, "booting "+k.Release)
	out.result = machine.Run(ctx, machine.Config{
		Image: k.Image, Initrd: initrd, Memory: o.memory, Timeout: o.timeout, Dir: dir,
		Output: out.output, Console: out.console, Begin: out.jobBegins, End: out.jobEnds,
	})
}

// checkJob is what `pillion check` says of the kernel, for the support table.
const checkJob = "check"

// grace is what a machine has left when a job is out of time, to say where it hangs.
const grace = 30 * time.Second

// plan is what a guest does.
func (o options) plan(suites []suite) wire.Plan {
	plan := wire.Plan{Modules: bootModules}
	limit := max(o.timeout-grace, o.timeout/2)
	if len(o.argv) > 0 {
		plan.Jobs = append(plan.Jobs, wire.Job{Name: filepath.Base(o.argv[0]), Path: guestBinary, Args: o.argv[1:], Dir: "/root", Timeout: limit})
		return plan
	}
	if o.table != "" {
		plan.Jobs = append(plan.Jobs, wire.Job{Name: checkJob, Path: guestPillion, Args: []string{"check", "-o", "json"}, Dir: "/", Timeout: limit})
	}
	for _, s := range suites {
		args := []string{"-test.v=test2json", "-test.parallel=4", fmt.Sprintf("-test.timeout=%s", limit)}
		if !o.full {
			args = append(args, "-test.short")
		}
		if o.run != "" {
			args = append(args, "-test.run="+o.run)
		}
		plan.Jobs = append(plan.Jobs, wire.Job{
			Name: s.name, Path: s.guestDir() + "/suite.test", Args: args, Dir: s.guestDir(), Timeout: limit + grace/3,
			Env: append([]string{"PILLION_TEST_BINARY=" + guestPillion, "PILLION_TEST_SLOWNESS=3"}, o.environ...),
		})
	}
	return plan
}
