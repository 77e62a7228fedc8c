// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/ebpf"
	"github.com/pillionproxy/pillion/redirect/iptables"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// filterCapturer drives the backends by packet filters, whose scope is the network namespace.
type filterCapturer struct{ backend Backend }

func (c filterCapturer) name() Backend { return c.backend }

// detect looks for the packet filters that may be used.
func detect(ctx context.Context, o Options) iptables.Tools {
	tools := iptables.Detect(ctx, cmp.Or(o.Flavour, iptables.Auto))
	tools.Tracked = tools.Tracked && !o.Untracked
	return tools
}

func (c filterCapturer) plan(ctx context.Context, o Options) (redirect.Plan, string, error) {
	host, err := redirect.ReadHost(0)
	if err != nil {
		return redirect.Plan{}, "", err
	}
	tools := detect(ctx, o)
	p, err := iptables.Plan(string(c.backend), o.Policy, host, tools)
	return p, "", err
}

func (c filterCapturer) install(ctx context.Context, o Options) (Result, error) {
	start := time.Now()
	if err := requireCapabilities(cap.NET_ADMIN); err != nil {
		return Result{}, err
	}
	reports, err := ebpf.Inspect()
	if err != nil {
		return Result{}, err
	}
	if err := taken(reports); err != nil {
		return Result{}, err
	}
	if o.Policy.Selection, err = exceptSession(o); err != nil {
		return Result{}, err
	}
	host, err := redirect.ReadHost(0)
	if err != nil {
		return Result{}, err
	}
	tools := detect(ctx, o)
	var r Result
	if r.Plan, err = iptables.Plan(string(c.backend), o.Policy, host, tools); err != nil {
		return r, err
	}
	installed, err := iptables.Install(ctx, r.Plan, tools)
	if err != nil {
		return r, err
	}
	r.Changed, r.Replaced = installed.Changed, installed.Replaced
	if o.Verify {
		if r.Checks, err = c.verify(ctx, r.Plan.Policy); err != nil {
			return r, errors.Join(err, installed.Rollback())
		}
	}
	err = installed.Commit()
	r.Took = time.Since(start)
	return r, err
}

func (c filterCapturer) verify(ctx context.Context, policy config.Capture) ([]redirect.Check, error) {
	checks, err := iptables.Prove(ctx, string(c.backend), policy)
	if err != nil {
		return checks, fmt.Errorf("verify the capture: %w", err)
	}
	return checks, failed(checks)
}

func (c filterCapturer) remove(ctx context.Context, _ string) error { return iptables.Remove(ctx) }

func (c filterCapturer) previous(ctx context.Context, _ config.Capture) (*config.Capture, bool, error) {
	reports, err := iptables.Inspect(ctx)
	if err != nil || len(reports) == 0 {
		return nil, false, err
	}
	return reports[0].Policy, true, nil
}
