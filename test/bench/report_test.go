// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"
)

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		values []float64
		want   float64
	}{{nil, 0}, {[]float64{3}, 3}, {[]float64{9, 1, 5}, 5}, {[]float64{4, 1, 3, 2}, 2.5}} {
		if got := median(c.values); got != c.want {
			t.Errorf("median(%v) = %v, want %v", c.values, got, c.want)
		}
	}
}

func TestRatioIsTakenRoundByRound(t *testing.T) {
	// The machine was twice as slow in the second round: the subject is still 1.5 times its base.
	if got := ratio([]float64{15, 30, 15}, []float64{10, 20, 10}); got != "1.50" {
		t.Errorf("ratio = %s, want 1.50", got)
	}
	if got := ratio([]float64{15}, []float64{0}); got != "" {
		t.Errorf("ratio to nothing = %q, want none", got)
	}
}

func TestShort(t *testing.T) {
	for v, want := range map[float64]string{0.1234: "0.123", 1.234: "1.23", 12.34: "12.3", 123.4: "123", 12345: "12345"} {
		if got := short(v); got != want {
			t.Errorf("short(%v) = %s, want %s", v, got, want)
		}
	}
}

func TestCaptureReportHasALineForEachSubjectAndFamily(t *testing.T) {
	all := results{}
	for _, subject := range captureSubjects {
		for _, family := range families {
			all[key{subject, family}] = []result{{one: sample{Connect: 50, FirstByte: 90}, many: sample{Rate: 1000}}}
		}
	}
	var out strings.Builder
	if err := (captureBench{rounds: 1, parallel: 16, subjects: captureSubjects}).report(&out, all); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"| IPv4 | direct | 50.0 [50.0..50.0] | 1.00 | 1.00 |", "| IPv6 | pillion |"} {
		if got := strings.Count(out.String(), want); got == 0 {
			t.Errorf("no line %q in\n%s", want, out.String())
		}
	}
}

func TestRatioOfMediansShowsTheRounds(t *testing.T) {
	// Medians 3 and 2; round by round 1/1, 3/2 and 8/4.
	if got := ratioOfMedians([]float64{1, 3, 8}, []float64{1, 2, 4}); got != "1.50 [1.00..2.00]" {
		t.Errorf("ratio = %s, want 1.50 [1.00..2.00]", got)
	}
	if got := ratioOfMedians([]float64{1}, nil); got != "" {
		t.Errorf("ratio to nothing = %q, want none", got)
	}
}

func TestProxiesReport(t *testing.T) {
	b := proxiesBench{rounds: 3, subjects: []string{direct, haproxy, pillion}, cases: []string{small, idle}}
	all := proxyResults{
		values: map[cell][]float64{
			{small, figureCPU, haproxy}:       {2, 1.6, 1.5},
			{small, figureCPU, pillion}:       {1.2, 0.8, 1.5},
			{small, figureCPU, direct}:        {0, 0, 0},
			{small, figureRate, direct}:       {100000},
			{idle, figureHeld(8000), haproxy}: {2},
			{idle, figureHeld(8000), pillion}: {1},
		},
		resent: map[[2]string]retransmits{{small, haproxy}: {segments: 3, syns: 2}, {small, pillion}: {}},
	}
	var out strings.Builder
	if err := b.report(&out, all); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"| case | figure | direct | haproxy | pillion | pillion / haproxy |\n|---|---|---|---|---|---|\n",
		"| small | CPU, s per 100,000 exchanges |  | 1.60 [1.50..2.00] | 1.20 [0.800..1.50] | 0.75 [0.50..1.00] |\n",
		"| small | exchanges/s | 100000 [100000..100000] |  |  |  |\n",
		"| idle | KiB each of 8000 connections |  | 2.00 [2.00..2.00] | 1.00 [1.00..1.00] | 0.50 [0.50..0.50] |\n",
		"\nTCP segments that were sent twice, in all rounds: small, haproxy: 3 (SYN: 2).\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
	if strings.Contains(out.String(), "| bulk |") || strings.Contains(out.String(), "nginx") {
		t.Errorf("what was not measured is in\n%s", out.String())
	}
}

func TestPlotIsInRelationToHAProxy(t *testing.T) {
	b := proxiesBench{subjects: []string{direct, haproxy, pillion}, cases: []string{small, idle, start}}
	data, columns := b.plotData(proxyResults{values: map[cell][]float64{
		{small, figureCPU, haproxy}:   {2, 1.6, 1.5},
		{small, figureCPU, pillion}:   {0.8},
		{start, figureStart, haproxy}: {30},
	}})
	if want := "case haproxy pillion\nsmall 1.000 0.500\n"; string(data) != want || columns != 2 {
		t.Errorf("%d columns of\n%swant 2 of\n%s", columns, data, want)
	}
	b.subjects = []string{pillion, nginx}
	if data, columns := b.plotData(proxyResults{}); columns != 0 {
		t.Errorf("%d columns of nothing:\n%s", columns, data)
	}
}

func TestStartsAreSpreadOverTheRounds(t *testing.T) {
	for rounds := 1; rounds <= 15; rounds++ {
		sum := 0
		for round := range rounds {
			sum += proxiesBench{rounds: rounds}.repeats(start, round)
		}
		if sum != starts {
			t.Errorf("%d rounds: %d starts, want %d", rounds, sum, starts)
		}
	}
}
