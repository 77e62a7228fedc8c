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

func TestReportHasALineForEachSubjectAndFamily(t *testing.T) {
	all := results{}
	for _, subject := range subjects {
		for _, family := range families {
			all[key{subject, family}] = []result{{one: sample{Connect: 50, FirstByte: 90}, many: sample{Rate: 1000}}}
		}
	}
	var out strings.Builder
	if err := (bench{rounds: 1, parallel: 16, subjects: subjects}).report(&out, all); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"| IPv4 | direct | 50.0 [50.0..50.0] | 1.00 | 1.00 |", "| IPv6 | pillion |"} {
		if got := strings.Count(out.String(), want); got == 0 {
			t.Errorf("no line %q in\n%s", want, out.String())
		}
	}
}
