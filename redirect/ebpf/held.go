// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/pillionproxy/pillion/bpf"
	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/cgroup"
	"golang.org/x/sys/unix"
)

// Capture is a Held capture: it lives as long as this process.
type Capture struct {
	in       *installer
	counters *ebpf.Map
}

// Hold installs a Held plan: programs are attached by links that the kernel removes when this process ends, however it
// ends, so that nothing captures without us. Where the kernel has no tcx (before 6.6), filters of a killed process stay
// until the next Hold or Remove, but see no marked packet any more. A failure leaves the host as it was. The caller holds
// the redirect.Lock.
func Hold(plan redirect.Plan, dir *cgroup.Dir, without bpf.CaptureCure) (*Capture, error) {
	if err := sweep(); err != nil {
		return nil, err
	}
	objects, err := load(plan, without, nil)
	if err != nil {
		return nil, err
	}
	in := &installer{plan: plan, dir: dir, objects: objects}
	in.OnRollback(func() error { objects.Close(); return nil })
	if err := in.hold(); err != nil {
		return nil, errors.Join(err, in.Rollback())
	}
	return &Capture{in: in, counters: objects.Maps[bpf.CaptureMapCounters]}, nil
}

// Counters reads the count of each verdict.
func (c *Capture) Counters() (map[string]uint64, error) { return readCounters(c.counters) }

// Close takes everything away again. It takes the redirect.Lock by itself, waiting no longer than a few seconds for it.
func (c *Capture) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	release, err := redirect.Lock(ctx)
	if err != nil {
		return errors.Join(err, c.in.Rollback())
	}
	defer release()
	return c.in.Rollback()
}

func (in *installer) hold() error {
	found, err := foundSysctls()
	if err != nil {
		return err
	}
	slot, err := claim(in.plan.Policy.Slot, found)
	if err != nil {
		return err
	}
	in.OnRollback(slot.Close)
	in.found = found
	// Whoever is the last to go gives the sysctls back, not whoever changed them.
	in.OnRollback(func() error { return restoreUnlessUsed(in.plan.Policy.Slot, found) })
	for _, step := range []func() error{
		in.holdFilters,
		func() error { return in.sysctls(found) },
		in.routes,
		in.rules,
		in.holdHooks,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// heldPlan stands in the note of a Held capture's filters, where there is no tcx. It says that the note alone means
// nothing: the capture is there while its process holds the slot.
const heldPlan = "held"

// holdFilters attaches those filters of the plan that are not there.
func (in *installer) holdFilters() error {
	for key := range in.held {
		if !slices.ContainsFunc(in.plan.Filters, func(f redirect.Filter) bool { return f.Index == key.index }) {
			delete(in.held, key) // the interface is gone, and its links with it
		}
	}
	for _, f := range in.plan.Filters {
		key := heldFilter{f.Index, f.Egress}
		if in.held[key] {
			continue
		}
		l, err := attachTCX(f, in.objects.Programs[f.Program])
		switch {
		case errors.Is(err, ebpf.ErrNotSupported):
			return in.filters(note{Slot: in.plan.Policy.Slot, CgroupID: in.dir.ID, Plan: heldPlan, Sysctls: in.found}, previous{})
		case errors.Is(err, unix.ENODEV):
			continue // it vanished
		case err != nil:
			return err
		}
		if in.held == nil {
			in.held = make(map[heldFilter]bool)
		}
		in.held[key] = true
		in.Changed = append(in.Changed, fmt.Sprintf("filter %s %s", f.Link, f.Direction()))
		in.OnRollback(l.Close)
	}
	return nil
}

// heldFilter is one side of an interface.
type heldFilter struct {
	index  int
	egress bool
}

func attachTCX(f redirect.Filter, p *ebpf.Program) (link.Link, error) {
	at := ebpf.AttachTCXIngress
	if f.Egress {
		at = ebpf.AttachTCXEgress
	}
	l, err := link.AttachTCX(link.TCXOptions{Interface: f.Index, Program: p, Attach: at})
	if err != nil {
		return nil, fmt.Errorf("attach %s to %s %s: %w", f.Program, f.Link, f.Direction(), err)
	}
	return l, nil
}

func (in *installer) holdHooks() error {
	for _, h := range in.plan.Hooks {
		l, err := holdHook(in.dir, h, in.objects.Programs[h.Program])
		if err != nil {
			return err
		}
		if err := in.Did("hook "+h.Attach, l.Close); err != nil {
			return err
		}
	}
	return nil
}

// sweep removes what killed processes left in slots that nobody uses: filters (where there is no tcx), rules and
// routes; and the sysctls, where a filter tells what they were.
func sweep() error {
	used, err := usedSlots()
	if err != nil {
		return err
	}
	found, err := foundSysctls()
	if err != nil {
		return err
	}
	var errs []error
	for slot := config.Slot(1); slot < config.Slots; slot++ {
		if _, ok := used[slot]; ok {
			continue
		}
		left, err := redirect.HasRouting(slot)
		if err != nil {
			return err
		}
		if left {
			errs = append(errs, removeFilters(slot), redirect.RemoveRouting(slot))
		}
	}
	if len(used) == 0 {
		errs = append(errs, redirect.RestoreSysctls(sysctls, found))
	}
	return errors.Join(errs...)
}
