// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"io"
	"strings"
)

// figure is one column: how to read it from a round, and what it is called.
type figure struct {
	name string
	of   func(result) float64
}

// report writes Markdown: the median of the rounds, the least and the most, and the median of the ratios within each
// round. A ratio is written only where both have the figure.
func (b captureBench) report(w io.Writer, all results) error {
	var out bytes.Buffer
	fmt.Fprintf(&out, "## Capture\n\n%d rounds of %d connections; %s\n", b.rounds, b.connections, machine())
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
