// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/test/vm/gotest"
	"github.com/pillionproxy/pillion/test/vm/machine"
	"github.com/pillionproxy/pillion/test/vm/wire"
)

// outcome is what became of one kernel.
type outcome struct {
	series, version string
	newest          bool
	files           []string

	p       *printer
	verbose bool
	raw     bool // a program of the user's: every line is shown as it is
	jobs    []*jobOutcome
	current *jobOutcome
	result  machine.Result
}

// jobOutcome is what became of one job.
type jobOutcome struct {
	name   string
	began  time.Time
	took   time.Duration
	end    *wire.End // nil: it did not end
	text   strings.Builder
	tests  gotest.Counter
	logged map[string][]string // what each test said, until it passes
}

func (o *outcome) begin(p *printer, plan wire.Plan, verbose, raw bool) {
	o.p, o.verbose, o.raw = p, verbose, raw
	for _, j := range plan.Jobs {
		o.jobs = append(o.jobs, &jobOutcome{name: j.Name, logged: map[string][]string{}})
	}
}

func (o *outcome) jobBegins(name string) {
	i := slices.IndexFunc(o.jobs, func(j *jobOutcome) bool { return j.name == name })
	if i < 0 {
		return
	}
	o.current = o.jobs[i]
	o.current.began = time.Now()
	if !o.raw {
		o.p.of(o.series, "running "+name)
	}
}

func (o *outcome) jobEnds(end wire.End) {
	j := o.current
	if j == nil {
		return
	}
	j.end, j.took = &end, time.Since(j.began)
	o.current = nil
	if j.name == checkJob || o.raw {
		return
	}
	o.p.of(o.series, fmt.Sprintf("%s: %s, %d passed, %d failed, %d skipped (%.0f s)", j.name, j.verdict(),
		j.tests.Count(gotest.Pass), j.tests.Count(gotest.Fail), j.tests.Count(gotest.Skip), j.took.Seconds()))
	if j.failed() && !o.verbose {
		for _, name := range slices.Concat(j.tests.Unfinished(), []string{""}) {
			for _, line := range j.logged[name] {
				o.p.of(o.series, line)
			}
		}
	}
}

// console hears the kernel.
func (o *outcome) console(line string) {
	if o.verbose {
		o.p.of(o.series, line)
	}
}

// mostLogged is how many lines of a test are kept.
const mostLogged = 300

// output hears a job. Of tests that pass only their names are shown, of those that fail everything that they said.
func (o *outcome) output(line string) {
	j := o.current
	if j == nil || o.raw {
		o.p.of(o.series, line)
		return
	}
	if j.name == checkJob {
		j.text.WriteString(line + "\n")
		return
	}
	line = j.tests.Line(line)
	name, verdict := j.tests.Ended()
	if verdict == "" {
		name = j.tests.Current()
		if o.verbose {
			o.p.of(o.series, line)
		} else if said := j.logged[name]; len(said) < mostLogged && !strings.HasPrefix(line, "=== ") {
			j.logged[name] = append(said, line)
		}
		return
	}
	if verdict == gotest.Fail && !o.verbose {
		for _, said := range j.logged[name] {
			o.p.of(o.series, said)
		}
	}
	delete(j.logged, name)
	if gotest.Top(name) || verdict == gotest.Fail || o.verbose {
		o.p.of(o.series, line)
	}
}

func (j *jobOutcome) failed() bool { return j.end == nil || j.end.Code != 0 }

func (j *jobOutcome) verdict() string {
	switch {
	case j.end == nil && j.began.IsZero():
		return "NOT REACHED"
	case j.end == nil:
		return "CUT SHORT"
	case j.end.TimedOut:
		return "OUT OF TIME"
	case j.end.Code > 1:
		return fmt.Sprintf("FAILED with exit code %d", j.end.Code)
	case j.end.Code != 0:
		return "FAILED"
	}
	return "passed"
}

// status is the exit status that one kernel asks for.
func (o *outcome) status() int {
	switch {
	case o.result.Err != nil:
		return exitMachine
	case o.raw:
		return o.result.Code
	case slices.ContainsFunc(o.jobs, (*jobOutcome).failed):
		return config.ExitFailure
	}
	return 0
}

// report prints what became of everything and returns the exit status.
func report(p *printer, outcomes []*outcome, took time.Duration) (status int) {
	passed, failed, skipped := 0, 0, 0
	for _, o := range outcomes {
		if status == 0 {
			status = o.status()
		}
		p.say("")
		p.say("kernel %s (%s): %s; booted in %.1f s, took %.0f s", o.series, o.version, o.verdict(), o.result.Booted.Seconds(), o.result.Took.Seconds())
		for _, f := range o.result.Findings {
			p.say("  the kernel says: %s", f.Line)
		}
		if o.result.Err != nil {
			p.say("  %v", o.result.Err)
			if hint := config.HintOf(o.result.Err); hint != "" {
				p.say("  hint: %s", hint)
			}
			p.say("  its last lines:")
			for _, line := range o.result.Last {
				p.say("    %s", line)
			}
		}
		if o.raw {
			continue
		}
		for _, j := range o.jobs {
			passed += j.tests.Count(gotest.Pass)
			failed += j.tests.Count(gotest.Fail)
			skipped += j.tests.Count(gotest.Skip)
			if j.failed() {
				p.say("  %s: %s", j.name, j.verdict())
			}
			skipped := map[string][]string{} // by reason
			for _, name := range slices.Sorted(maps.Keys(j.tests.Tests)) {
				switch j.tests.Tests[name] {
				case gotest.Fail:
					p.say("    failed: %s", name)
				case gotest.Skip:
					why := j.tests.Reasons[name]
					skipped[why] = append(skipped[why], name)
				}
			}
			for _, why := range slices.Sorted(maps.Keys(skipped)) {
				p.say("    skipped: %s %s: %s", j.name, few(skipped[why]), why)
			}
			for _, name := range j.tests.Unfinished() {
				p.say("    did not end: %s", name)
			}
		}
	}
	p.say("")
	if passed+failed+skipped > 0 {
		p.say("%d passed, %d failed, %d skipped", passed, failed, skipped)
	}
	p.say("took %.0f s", took.Seconds())
	return status
}

// few names the first of many.
func few(names []string) string {
	const most = 4
	if rest := len(names) - most; rest > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), rest)
	}
	return strings.Join(names, ", ")
}

// verdict says in words how a kernel did.
func (o *outcome) verdict() string {
	switch {
	case o.result.Err != nil:
		return "THE MACHINE FAILED"
	case o.status() == 0:
		return "passed"
	case o.raw:
		return fmt.Sprintf("exit code %d", o.result.Code)
	}
	return "FAILED"
}
