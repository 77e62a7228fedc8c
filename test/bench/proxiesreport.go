// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"
)

const (
	figureCPU           = "CPU, s per 100,000 exchanges"
	figureRate          = "exchanges/s"
	figureBulkCPU       = "CPU, s/GiB"
	figureBulkRate      = "GiB/s"
	figureP50           = "p50, µs"
	figureP99           = "p99, µs"
	figureIdleAll       = "process without connections, KiB"
	figureIdleAnonymous = "the same, anonymous"
	figureStart         = "ms"
)

func figureHeld(n int) string { return fmt.Sprintf("KiB each of %d connections", n) }

// figuresOf are the figures of a case, the primary one first.
func figuresOf(kase string) []string {
	switch kase {
	case bulk:
		return []string{figureBulkCPU, figureBulkRate, figureP50, figureP99}
	case idle:
		var figures []string
		for _, n := range held {
			figures = append(figures, figureHeld(n))
		}
		return append(figures, figureIdleAll, figureIdleAnonymous)
	case start:
		return []string{figureStart}
	}
	return []string{figureCPU, figureRate, figureP50, figureP99}
}

// quotients are those of the ratios.
var quotients = [][2]string{{pillion, haproxy}, {pillion, nginx}, {pillionRedirect, haproxy}, {pillionRedirect, nginx}}

// report writes a Markdown table: the median of the rounds, the least and the most. A ratio is that of the medians, with the
// least and the most of the ratios within a round; it is written only where both have the figure.
func (b proxiesBench) report(w io.Writer, all proxyResults) error {
	var out bytes.Buffer
	fmt.Fprintf(&out, "## Proxies\n\n%d rounds of %s; %s\nMedian [least..most]; a ratio is that of the medians.\n", b.rounds, b.window, machine())
	var ratios [][2]string
	for _, q := range quotients {
		if slices.Contains(b.subjects, q[0]) && slices.Contains(b.subjects, q[1]) {
			ratios = append(ratios, q)
		}
	}
	out.WriteString("\n| case | figure |")
	for _, subject := range b.subjects {
		fmt.Fprintf(&out, " %s |", subject)
	}
	for _, q := range ratios {
		fmt.Fprintf(&out, " %s / %s |", q[0], q[1])
	}
	fmt.Fprintf(&out, "\n|---|---|%s\n", strings.Repeat("---|", len(b.subjects)+len(ratios)))
	for _, kase := range b.cases {
		for _, figure := range figuresOf(kase) {
			fmt.Fprintf(&out, "| %s | %s |", kase, figure)
			for _, subject := range b.subjects {
				fmt.Fprintf(&out, " %s |", spread(all.values[cell{kase, figure, subject}]))
			}
			for _, q := range ratios {
				fmt.Fprintf(&out, " %s |", ratioOfMedians(all.values[cell{kase, figure, q[0]}], all.values[cell{kase, figure, q[1]}]))
			}
			out.WriteByte('\n')
		}
	}
	out.WriteString("\n" + b.resent(all) + "\n")
	_, err := w.Write(out.Bytes())
	return err
}

// resent says what was sent twice; see retransmits.
func (b proxiesBench) resent(all proxyResults) string {
	var found []string
	for _, kase := range b.cases {
		for _, subject := range b.subjects {
			if r := all.resent[[2]string{kase, subject}]; r.segments > 0 {
				found = append(found, fmt.Sprintf("%s, %s: %d (SYN: %d)", kase, subject, r.segments, r.syns))
			}
		}
	}
	if found == nil {
		return "No TCP segment was sent twice."
	}
	return "TCP segments that were sent twice, in all rounds: " + strings.Join(found, "; ") + "."
}
