// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
)

// figure is one column: how to read it from a round, and what it is called.
type figure struct {
	name string
	of   func(result) float64
}

// report writes Markdown: the median of the rounds, the least and the most, and the median of the ratios within each
// round. A ratio is written only where both have the figure.
func (b bench) report(w io.Writer, all results) error {
	var out bytes.Buffer
	fmt.Fprintf(&out, "%d rounds of %d connections; Linux %s, %d CPUs, %s. Client, sidecar and server share them.\n",
		b.rounds, b.connections, kernel(), runtime.NumCPU(), runtime.Version())
	for _, table := range []struct {
		title   string
		figures []figure
	}{
		{"One connection at a time, µs", []figure{
			{"connect()", func(r result) float64 { return r.one.Connect }},
			{"first byte", func(r result) float64 { return r.one.FirstByte }},
		}},
		{fmt.Sprintf("%d at a time", b.parallel), []figure{
			{"connections/s", func(r result) float64 { return r.many.Rate }},
			{"sidecar CPU, µs each", func(r result) float64 { return r.cpu }},
		}},
		{fmt.Sprintf("%d MB over one connection", b.bulk/1e6), []figure{
			{"MB/s", func(r result) float64 { return r.bulk.Bulk }},
			{"sidecar CPU, ms/GB", func(r result) float64 { return r.bulkCPU }},
		}},
	} {
		fmt.Fprintf(&out, "\n### %s\n\n| family | subject |", table.title)
		for _, f := range table.figures {
			fmt.Fprintf(&out, " %s |", f.name)
			for _, base := range bases {
				fmt.Fprintf(&out, " × %s |", base.called)
			}
		}
		fmt.Fprintf(&out, "\n|---|---|%s\n", strings.Repeat("---|", (1+len(bases))*len(table.figures)))
		for _, family := range families {
			for _, subject := range b.subjects {
				fmt.Fprintf(&out, "| %s | %s |", family, subject)
				for _, f := range table.figures {
					rounds := column(all[key{subject, family}], f.of)
					fmt.Fprintf(&out, " %s |", spread(rounds))
					for _, base := range bases {
						fmt.Fprintf(&out, " %s |", ratio(rounds, column(all[key{base.subject, family}], f.of)))
					}
				}
				out.WriteByte('\n')
			}
		}
	}
	_, err := w.Write(out.Bytes())
	return err
}

func column(rounds []result, of func(result) float64) []float64 {
	values := make([]float64, len(rounds))
	for i, r := range rounds {
		values[i] = of(r)
	}
	return values
}

// spread is "median [least..most]", or nothing where nothing was measured.
func spread(values []float64) string {
	if len(values) == 0 || slices.Max(values) == 0 {
		return ""
	}
	return fmt.Sprintf("%s [%s..%s]", short(median(values)), short(slices.Min(values)), short(slices.Max(values)))
}

// ratio is the median of the ratios of the same round.
func ratio(values, base []float64) string {
	var ratios []float64
	for i := range min(len(values), len(base)) {
		if values[i] != 0 && base[i] != 0 {
			ratios = append(ratios, values[i]/base[i])
		}
	}
	if len(ratios) == 0 {
		return ""
	}
	return fmt.Sprintf("%.2f", median(ratios))
}

// short writes three significant digits.
func short(v float64) string {
	digits := 2 - int(math.Floor(math.Log10(math.Max(v, 1e-3))))
	return fmt.Sprintf("%.*f", min(max(digits, 0), 3), v)
}

func kernel() string {
	text, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return "?"
	}
	return strings.TrimSpace(string(text))
}
