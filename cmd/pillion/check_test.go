// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pillionproxy/pillion/redirect/check"
)

func TestCheckReportAsPeopleReadIt(t *testing.T) {
	r := check.Report{
		Rows: []check.Row{
			{Group: "kernel", What: "release", State: check.OK, Detail: "6.12.0"},
			{Group: "capabilities", What: "CAP_BPF", State: check.Missing, Detail: "not held", Hint: "add it", Needs: map[check.Backend]check.Need{check.EBPF: check.Required}},
			{Group: "capabilities", What: "CAP_SETUID", State: check.OK, Needs: map[check.Backend]check.Need{check.TProxy: check.Better, check.EBPF: check.Better}},
		},
		Verdicts: []check.Verdict{
			{Backend: check.EBPF, Usable: check.No, Reasons: []string{"CAP_BPF: not held", "another"}},
			{Backend: check.TProxy, Usable: check.Full},
		},
	}
	const want = `  KERNEL
    release  ok  -  6.12.0
  CAPABILITIES
    CAP_BPF     missing  ebpf  not held
                               hint: add it
    CAP_SETUID  ok       (ebpf) (tproxy)

  ebpf    not usable  CAP_BPF: not held
                      another
  tproxy  usable
`
	var b strings.Builder
	if err := printReport(&b, r); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestBackendFlag(t *testing.T) {
	var b backendsFlag
	if err := b.Set("ebpf, tproxy"); err != nil || b.String() != "ebpf,tproxy" {
		t.Errorf("%s, %v", b.String(), err)
	}
	if err := b.Set("nft"); err == nil {
		t.Error("nft is taken for a backend")
	}
}
