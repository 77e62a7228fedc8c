// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"regexp"
	"strings"
	"testing"

	"gotest.tools/v3/golden"
)

// TestOutputs compares what the verbs that only look say of one capture with testdata/outputs.
func TestOutputs(t *testing.T) {
	for _, b := range []backend{backends[0], filterBackends[0], filterBackends[2]} {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			p := newPodBy(t, b)
			p.asRoot = true
			p.init("--no-verify", "--exclude-outbound-ports=8000-8999", "--include-inbound-cidrs=10.0.0.0/8,fd00::/8")
			p.startProxyOf(b)
			look := func(name, form string, args ...string) {
				for _, form := range []string{form, "json"} {
					r := run(t, p.pillion(append(args, "-o", form)...))
					must(t, name, r)
					golden.Assert(t, p.scrubbed(r.stdout), fmt.Sprintf("outputs/%s-%s.%s", b.name, name, form))
				}
			}
			look("status", "table", "status")
			look("verify", "table", "verify")
			look("explain", "text", "explain", "10.99.0.1:8080", "--uid", "1000")
			look("explain-inbound", "text", "explain", "--inbound", "10.99.0.1:443")
		})
	}
}

// scrubbed takes out what differs from run to run.
func (p *pod) scrubbed(output string) string {
	output = strings.ReplaceAll(output, p.cg.Path, "$CGROUP")
	for _, r := range []struct{ pattern, with string }{
		{`(by ip6?tables)(-nft|-legacy)?`, "${1}"}, // as the host's choice is
		{`("cgroup_id": )\d+`, "${1}1"},
		{`(?m)^(  verdict .*|    "[a-z0-9_]+": )\d+,?\n`, ""}, // counters: probes, and whatever IPv6 does by itself
	} {
		output = regexp.MustCompile(r.pattern).ReplaceAllString(output, r.with)
	}
	return output
}
