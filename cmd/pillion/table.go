// SPDX-License-Identifier: Apache-2.0

package main

import (
	"io"
	"strings"
	"text/tabwriter"
)

// table aligns rows for people. Nothing is written before flush.
type table struct{ w *tabwriter.Writer }

func newTable(w io.Writer) table { return table{tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)} }

func (t table) row(cells ...string) {
	io.WriteString(t.w, "  "+strings.TrimRight(strings.Join(cells, "\t"), "\t")+"\n")
}

func (t table) flush() error { return t.w.Flush() }
