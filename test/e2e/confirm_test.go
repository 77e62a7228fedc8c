// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"reflect"
	"strings"
	"testing"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/test/testnet"
)

// TestConfirm: what is confirmed stays; what is not is taken back by itself, and what was there before is there again.
func TestConfirm(t *testing.T) {
	const explained = "10.99.0.1:8000"
	explain := func(p *pod) string { return run(t, p.pillion("explain", explained)).stdout }

	t.Run("confirmed", func(t *testing.T) {
		t.Parallel()
		p := newPod(t)
		wantFault(t, run(t, p.pillion("confirm")), config.ExitFailure, "no installation waits")
		r := run(t, p.initCmd("--confirm=1h"))
		must(t, "init", r)
		if !strings.Contains(r.stdout, "pillion confirm") {
			t.Errorf("init does not say that it waits:\n%s", r.stdout)
		}
		wantFault(t, run(t, p.initCmd()), config.ExitFailure, "waits to be confirmed")
		must(t, "confirm", run(t, p.pillion("confirm")))
		must(t, "status", run(t, p.pillion("status")))
		wantFault(t, run(t, p.pillion("confirm")), config.ExitFailure, "no installation waits")
		p.init("--confirm=1h") // nothing is changed, so nothing waits
		wantFault(t, run(t, p.pillion("confirm")), config.ExitFailure, "no installation waits")
	})
	t.Run("taken back", func(t *testing.T) {
		t.Parallel()
		p := newPod(t)
		before := p.snapshot()
		must(t, "init", run(t, p.pillion("init", "--cgroup", p.cg.Path, "--confirm=100ms")))
		testnet.Wait(t, "the capture is taken back", func() bool { return run(t, p.pillion("status")).code == config.ExitFailure })
		testnet.Wait(t, "everything is as it was", func() bool { return reflect.DeepEqual(p.snapshot(), before) })
	})
	t.Run("given back", func(t *testing.T) {
		t.Parallel()
		p := newPod(t)
		must(t, "init", run(t, p.pillion("init", "--cgroup", p.cg.Path)))
		must(t, "init", run(t, p.pillion("init", "--cgroup", p.cg.Path, "--exclude-outbound-ports=8000", "--confirm=100ms")))
		testnet.Wait(t, "the earlier policy is back", func() bool { return strings.HasPrefix(explain(p), "captured") })
		must(t, "status", run(t, p.pillion("status")))
	})
	t.Run("wrong", func(t *testing.T) {
		t.Parallel()
		p := newPod(t)
		wantFault(t, run(t, p.initCmd("--confirm=-1s")), config.ExitConfig, "--confirm")
		wantFault(t, run(t, p.initCmd("--confirm=soon")), config.ExitUsage, "soon")
	})
}
