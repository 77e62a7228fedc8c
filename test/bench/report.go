// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
)

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	if len(sorted) == 0 {
		return 0
	}
	return (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
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

// ratioOfMedians is that, and the least and the most of the ratios within a round.
func ratioOfMedians(values, base []float64) string {
	n := min(len(values), len(base))
	if n == 0 || median(values) == 0 || median(base) == 0 {
		return ""
	}
	ratios := make([]float64, n)
	for i := range n {
		ratios[i] = values[i] / base[i]
	}
	return fmt.Sprintf("%.2f [%.2f..%.2f]", median(values)/median(base), slices.Min(ratios), slices.Max(ratios))
}

// short writes three significant digits.
func short(v float64) string {
	digits := 2 - int(math.Floor(math.Log10(math.Max(v, 1e-3))))
	return fmt.Sprintf("%.*f", min(max(digits, 0), 3), v)
}

// machine says where the figures come from.
func machine() string {
	return fmt.Sprintf("Linux %s, %d CPUs, %s. Client, sidecar and server share them.", kernel(), runtime.NumCPU(), runtime.Version())
}

func kernel() string {
	text, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return "?"
	}
	return strings.TrimSpace(string(text))
}
