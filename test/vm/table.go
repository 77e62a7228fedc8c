// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect/check"
	"github.com/pillionproxy/pillion/test/vm/debian"
	"github.com/pillionproxy/pillion/test/vm/gotest"
)

// The lines between which the support table stands.
const (
	tableBegins = "<!-- support table: kept by make test-vm -->"
	tableEnds   = "<!-- end of the support table -->"
)

// lacking begins the reason of a test that is skipped for want of something in the kernel: see testnet.Need.
const lacking = "this kernel does not have "

// kernelGroups are the groups of `pillion check` that tell of the kernel, not of the machine that it runs on.
var kernelGroups = []string{"bpf", "netfilter", "sysctls"}

// table is kernel × feature × backend.
type table struct {
	columns []string
	rows    []row
	newest  string // the series that was the newest, for the reader
}

type row struct {
	feature, backends string
	cells             map[string]string // by column; none is "yes"
}

const yes = "yes"

// column is the name of a kernel in the table: the newest has no number, or every new one would make the table stale.
func (o *outcome) column() string {
	if o.newest {
		return debian.Newest
	}
	return o.series
}

// tableOf makes the table of what was found.
func tableOf(outcomes []*outcome) (table, error) {
	var t table
	for _, o := range outcomes {
		if o.newest {
			t.newest = o.series
		}
		t.columns = append(t.columns, o.column())
		if err := t.add(o); err != nil {
			return t, fmt.Errorf("kernel %s: %w", o.series, err)
		}
	}
	return t, nil
}

// add adds what one kernel has.
func (t *table) add(o *outcome) error {
	for _, j := range o.jobs {
		if j.name != checkJob {
			for name, reason := range j.tests.Reasons {
				if what, ok := strings.CutPrefix(reason, lacking); ok && j.tests.Tests[name] == gotest.Skip {
					feature, why, _ := strings.Cut(what, ": ")
					t.set(feature, "", o.column(), no(why))
				}
			}
			continue
		}
		var r check.Report
		if err := json.Unmarshal([]byte(j.text.String()), &r); err != nil {
			return fmt.Errorf("read what pillion check says: %w", err)
		}
		for _, v := range r.Verdicts {
			switch v.Usable {
			case check.Full:
				t.set("backend `"+string(v.Backend)+"`", "", o.column(), yes)
			case check.Limited:
				t.set("backend `"+string(v.Backend)+"`", "", o.column(), "with limits: "+strings.Join(v.Reasons, "; "))
			case check.No, check.Unclear:
				t.set("backend `"+string(v.Backend)+"`", "", o.column(), no(strings.Join(v.Reasons, "; ")))
			}
		}
		for _, c := range r.Rows {
			if !slices.Contains(kernelGroups, c.Group) || c.State == check.Unknown {
				continue
			}
			cell := yes
			if c.State != check.OK {
				cell = no(c.Detail)
			}
			t.set(c.What, backendsOf(c), o.column(), cell)
		}
	}
	return nil
}

func no(why string) string {
	if why == "" {
		return "no"
	}
	return "no: " + strings.ReplaceAll(strings.ReplaceAll(why, "\n", " "), "|", "/")
}

// backendsOf says which backends need a thing, and which do better with it.
func backendsOf(c check.Row) string {
	var list []string
	for _, b := range check.Backends() {
		switch c.Needs[b] {
		case check.Required:
			list = append(list, "`"+string(b)+"`")
		case check.Better:
			list = append(list, "`"+string(b)+"` (better)")
		}
	}
	return strings.Join(list, ", ")
}

func (t *table) set(feature, backends, column, cell string) {
	i := slices.IndexFunc(t.rows, func(r row) bool { return r.feature == feature })
	if i < 0 {
		i = len(t.rows)
		t.rows = append(t.rows, row{feature: feature, cells: map[string]string{}})
	}
	if backends != "" {
		t.rows[i].backends = backends
	}
	t.rows[i].cells[column] = cell
}

// cell is what the table says of a feature on a kernel. A feature of which nothing was said is there: a test that lacks it
// says so.
func (r row) cell(column string) string {
	if c, ok := r.cells[column]; ok {
		return c
	}
	return yes
}

// String renders the table.
func (t table) String() string {
	var b strings.Builder
	line := func(cells ...string) { fmt.Fprintln(&b, "| "+strings.Join(cells, " | ")+" |") }
	line(append([]string{"on Linux", "for"}, t.columns...)...)
	line(slices.Repeat([]string{"---"}, len(t.columns)+2)...)
	for _, r := range t.rows {
		cells := []string{r.feature, r.backends}
		for _, c := range t.columns {
			cells = append(cells, r.cell(c))
		}
		line(cells...)
	}
	if t.newest != "" {
		fmt.Fprintf(&b, "\n`newest` is the newest kernel of Debian's backports: %s%s.\n", t.newest, whenMade)
	}
	return b.String()
}

const whenMade = " when this was made"

// parseTable reads what String wrote.
func parseTable(text string) (t table) {
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if before, ok := strings.CutSuffix(line, whenMade+"."); ok {
			t.newest = before[strings.LastIndex(before, " ")+1:]
		}
		fields, ok := strings.CutPrefix(line, "| ")
		if !ok {
			continue
		}
		cells := strings.Split(strings.TrimSuffix(fields, " |"), " | ")
		switch {
		case len(cells) < 3 || cells[0] == "---":
		case t.columns == nil:
			t.columns = cells[2:]
		case len(cells) == len(t.columns)+2:
			for i, c := range t.columns {
				t.set(cells[0], strings.TrimSpace(cells[1]), c, cells[i+2])
			}
		}
	}
	return t
}

// merge takes the columns of a run into a table of more kernels. A row that the run has not, and that is no test's, goes
// if the run had every column.
func (t table) merge(run table) table {
	if len(t.columns) == 0 || !slices.ContainsFunc(t.columns, func(c string) bool { return !slices.Contains(run.columns, c) }) {
		return run
	}
	merged := table{columns: t.columns, newest: t.newest}
	for _, c := range run.columns {
		if !slices.Contains(merged.columns, c) {
			merged.columns = append(merged.columns, c)
		}
	}
	if run.newest != "" {
		merged.newest = run.newest
	}
	for _, r := range t.rows {
		for _, c := range t.columns {
			if !slices.Contains(run.columns, c) {
				merged.set(r.feature, r.backends, c, r.cell(c))
			}
		}
	}
	for _, r := range run.rows {
		for _, c := range run.columns {
			merged.set(r.feature, r.backends, c, r.cell(c))
		}
	}
	return merged
}

var madeOf = regexp.MustCompile(`: [0-9.]+` + whenMade)

// keepTable compares the table in a file with what was found. If they differ it writes the table and fails, so that nobody
// takes the old one for true.
func keepTable(file string, outcomes []*outcome) error {
	content, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	before, rest, begins := strings.Cut(string(content), tableBegins+"\n")
	old, after, ends := strings.Cut(rest, tableEnds)
	if !begins || !ends {
		return &config.Fault{Err: fmt.Errorf("%s has no place for the support table", file), Hint: "write two lines where it shall stand: " + tableBegins + " and " + tableEnds}
	}
	found, err := tableOf(outcomes)
	if err != nil {
		return err
	}
	text := "\n" + parseTable(old).merge(found).String() + "\n"
	if madeOf.ReplaceAllString(text, "") == madeOf.ReplaceAllString(old, "") {
		return nil
	}
	if err := os.WriteFile(file, []byte(before+tableBegins+"\n"+text+tableEnds+after), 0o644); err != nil {
		return err
	}
	return &config.Fault{Err: fmt.Errorf("the support table in %s was not what these kernels have, and has been corrected", file), Hint: "read the difference, and commit it"}
}
