// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// draw has gnuplot draw the CPU times into the file of -plot.
func (b proxiesBench) draw(ctx context.Context, all proxyResults) (err error) {
	data, columns := b.plotData(all)
	if columns == 0 {
		return errors.New("-plot: no case with CPU time was measured")
	}
	dir, err := os.MkdirTemp("", "pillion-bench.")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	output, err := filepath.Abs(b.plot)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(output), 0o755); err != nil {
		return err
	}
	err = errors.Join(
		os.WriteFile(filepath.Join(dir, "data"), data, 0o644),
		os.WriteFile(filepath.Join(dir, "script"), []byte(fmt.Sprintf(plotScript, machine(), columns+1)), 0o644),
	)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "gnuplot", "script")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("gnuplot: %w\n%s", err, out)
	}
	png, err := os.ReadFile(filepath.Join(dir, "plot.png"))
	if err != nil {
		return err
	}
	if err := os.WriteFile(output, png, 0o644); err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, "the plot is", b.plot)
	return nil
}

// plotData is a table for gnuplot: a column for each proxy, a row for each case with a primary figure of CPU time, in
// relation to HAProxy's.
func (b proxiesBench) plotData(all proxyResults) (data []byte, columns int) {
	var out bytes.Buffer
	out.WriteString("case")
	var proxies []string
	for _, subject := range b.subjects {
		if subject != direct {
			proxies = append(proxies, subject)
			fmt.Fprintf(&out, " %s", subject)
		}
	}
	out.WriteByte('\n')
	rows := 0
	for _, kase := range b.cases {
		figure := figuresOf(kase)[0]
		base := median(all.values[cell{kase, figure, haproxy}])
		if !strings.HasPrefix(figure, "CPU") || base == 0 {
			continue
		}
		rows++
		out.WriteString(kase)
		for _, subject := range proxies {
			fmt.Fprintf(&out, " %.3f", median(all.values[cell{kase, figure, subject}])/base)
		}
		out.WriteByte('\n')
	}
	if rows == 0 {
		return nil, 0
	}
	return out.Bytes(), len(proxies)
}

// plotScript takes what was measured on, and the last column. A bar above 3 is cut, so that one of them does not flatten the
// others; the number at its top is true.
const plotScript = `set terminal pngcairo size 1000,600 font "sans,12"
set output "plot.png"
set title "CPU time of the proxy in relation to HAProxy (less is better)"
set xlabel "%s" noenhanced font ",9"
set datafile columnheaders
set style data histograms
set style histogram clustered gap 1
set style fill solid 0.85 border -1
set yrange [0:*<3]
set ytics nomirror
set xtics nomirror scale 0
set grid ytics
set key outside right top
last = %d
plot for [i=2:last] "data" using i:xtic(1) title columnheader(i), \
	for [i=2:last] "" using ($0+(i-1-last/2.0)/last):(column(i)>3 ? 3 : column(i)):(sprintf("%%.2f", column(i))) with labels offset 0,0.6 font ",9" notitle
`
