// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/ebpf"
	"github.com/pillionproxy/pillion/redirect/iptables"
)

// ebpfCapturer drives the backend ebpf, whose scope is a cgroup.
type ebpfCapturer struct{}

func (ebpfCapturer) name() Backend { return EBPF }

func (ebpfCapturer) plan(_ context.Context, o Options) (redirect.Plan, string, error) {
	t, err := findTarget(o.Policy.Cgroup)
	if err != nil {
		return redirect.Plan{}, "", err
	}
	defer t.Close()
	p, err := planFor(o.Policy, t.Dir, redirect.Persistent)
	return p, t.foundBy, err
}

func (ebpfCapturer) install(ctx context.Context, o Options) (Result, error) {
	start := time.Now()
	if err := RequireCapabilities(); err != nil {
		return Result{}, err
	}
	others, err := iptables.Inspect(ctx)
	if err != nil {
		others = nil // no packet filter that could be asked: none that captures
	}
	if err := taken(others); err != nil {
		return Result{}, err
	}
	t, err := findTarget(o.Policy.Cgroup)
	if err != nil {
		return Result{}, err
	}
	defer t.Close()
	r := Result{Cgroup: t.Path, FoundBy: t.foundBy}
	if r.Plan, err = planFor(o.Policy, t.Dir, redirect.Persistent); err != nil {
		return r, err
	}
	installed, err := ebpf.Install(r.Plan, t.Dir, o.Options)
	if err != nil {
		return r, err
	}
	r.Changed, r.Replaced = installed.Changed, installed.Replaced
	if o.Verify {
		if r.Checks, err = verify(ctx, t, r.Plan.Policy); err != nil {
			return r, errors.Join(err, installed.Rollback())
		}
	}
	err = installed.Commit()
	r.Took = time.Since(start)
	return r, err
}

func (ebpfCapturer) verify(ctx context.Context, policy config.Capture) ([]redirect.Check, error) {
	if err := RequireCapabilities(); err != nil {
		return nil, err
	}
	t, err := findTarget(policy.Cgroup)
	if err != nil {
		return nil, err
	}
	defer t.Close()
	return verify(ctx, t, policy)
}

func (ebpfCapturer) remove(_ context.Context, path string) error {
	if err := RequireCapabilities(); err != nil {
		return err
	}
	t, err := findTarget(path)
	if err != nil {
		return err
	}
	defer t.Close()
	_, err = ebpf.Remove(t.Dir)
	if errors.Is(err, ebpf.ErrNotInstalled) {
		return &config.Fault{
			Err:  fmt.Errorf("cgroup %s: %w", t.Path, err),
			Hint: "`pillion status` shows every capture of this network namespace; enter the namespace of the pod or command first (nsenter --net)",
		}
	}
	return err
}

// previous: nothing may be replaced where the policy may not be read, for both take CAP_SYS_ADMIN.
func (ebpfCapturer) previous(_ context.Context, policy config.Capture) (*config.Capture, bool, error) {
	t, err := findTarget(policy.Cgroup)
	if err != nil {
		return nil, false, err
	}
	defer t.Close()
	reports, err := ebpf.Inspect()
	if err != nil {
		return nil, false, err
	}
	for _, r := range reports {
		if r.CgroupID == t.ID && r.Slot == policy.Slot {
			if r.Policy != nil {
				r.Policy.Cgroup = r.Cgroup
			}
			return r.Policy, true, nil
		}
	}
	return nil, false, nil
}
