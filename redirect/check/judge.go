// SPDX-License-Identifier: Apache-2.0

package check

import (
	"fmt"
	"slices"
	"strings"

	"github.com/pillionproxy/pillion/config"
)

// Judge says what facts mean for the backends that are asked for (none: all), if a capture were installed with what init
// and proxy share.
func Judge(f Facts, shared config.Shared, only ...Backend) Report {
	if len(only) == 0 {
		only = Backends()
	}
	var r Report
	for _, rows := range [][]Row{
		kernelRows(f), cgroupRows(f), bpfRows(f), capabilityRows(f), sysctlRows(f), netfilterRows(f),
		networkRows(f, shared), neighbourRows(f), namespaceRows(f),
	} {
		for _, row := range rows {
			if row.concerns(only) {
				r.Rows = append(r.Rows, row.tidy())
			}
		}
	}
	for _, b := range only {
		r.Verdicts = append(r.Verdicts, verdict(b, r.Rows))
	}
	return r
}

// concerns reports whether the row matters to one of the backends, or is only said.
func (r Row) concerns(backends []Backend) bool {
	return len(r.Needs) == 0 || slices.ContainsFunc(backends, func(b Backend) bool { return r.Needs[b] != "" })
}

// tidy takes off what does not apply to the row's state.
func (r Row) tidy() Row {
	if r.State == OK {
		r.Hint, r.Lost = "", ""
	}
	return r
}

// verdict sums up the rows for one backend. One that is required and not there decides; one that could not be asked for
// leaves it open.
func verdict(b Backend, rows []Row) Verdict {
	v := Verdict{Backend: b, Usable: Full}
	var refused, open, lost []string
	for _, r := range rows {
		reason := r.What + ": " + r.Detail
		switch need := r.Needs[b]; {
		case need == "" || r.State == OK:
		case need == Required && r.State == Unknown:
			open = append(open, reason)
		case need == Required:
			refused = append(refused, reason)
		case r.State == Missing && r.Lost != "":
			lost = append(lost, fmt.Sprintf("without %s: %s", r.What, r.Lost))
		case r.State == Conflict && r.Lost != "":
			lost = append(lost, fmt.Sprintf("%s: %s", r.What, r.Lost))
		}
	}
	switch {
	case len(refused) > 0:
		v.Usable, v.Reasons = No, refused
	case len(open) > 0:
		v.Usable, v.Reasons = Unclear, open
	case len(lost) > 0:
		v.Usable, v.Reasons = Limited, lost
	}
	return v
}

// needs are those of several backends alike.
func needs(n Need, backends ...Backend) map[Backend]Need {
	m := make(map[Backend]Need, len(backends))
	for _, b := range backends {
		m[b] = n
	}
	return m
}

func kernelRows(f Facts) []Row {
	kernel := Row{Group: "kernel", What: "release", State: OK, Detail: f.Kernel}
	if before(f.Kernel, 5, 10) {
		kernel.Detail += "; Pillion is tested from 5.10 on"
	}
	machine := Row{Group: "kernel", What: "architecture", State: OK, Detail: f.Machine}
	if f.Machine != "x86_64" {
		machine.Detail += "; Pillion is tested on x86_64"
	}
	return []Row{kernel, machine}
}

// before compares releases. It serves only for what cannot be asked for.
func before(release string, major, minor int) bool {
	var a, b int
	if n, _ := fmt.Sscanf(release, "%d.%d", &a, &b); n != 2 {
		return false
	}
	return a < major || a == major && b < minor
}

func list(items []string) string { return strings.Join(items, ", ") }
