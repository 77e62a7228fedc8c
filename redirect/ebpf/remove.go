// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"errors"
	"fmt"
	"slices"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/cgroup"
	"github.com/pillionproxy/pillion/redirect/probe"
)

// ErrNotInstalled says that there is nothing to remove.
var ErrNotInstalled = errors.New("nothing of pillion is installed here")

// Remove takes away every Persistent capture of the cgroup in this network namespace, and gives back what was there
// before: hooks first, then rules, routes, sysctls and filters. Hooks that may not be detached are an error, and nothing
// is changed then: a capture half removed would mark what nobody takes. Where there is nothing, ErrNotInstalled. The
// caller holds the redirect.Lock.
func Remove(dir *cgroup.Dir) ([]config.Slot, error) {
	ours, _, err := listFilters()
	if err != nil {
		return nil, err
	}
	var slots []config.Slot
	var own, known []uint32
	for _, f := range ours {
		known = append(known, f.Note.Hooks...)
		if f.Note.CgroupID == dir.ID && !slices.Contains(slots, f.Note.Slot) {
			slots = append(slots, f.Note.Slot)
			own = append(own, f.Note.Hooks...)
		}
	}
	own = append(own, orphanHooks(dir, known)...)
	if len(slots) == 0 && len(own) == 0 {
		return nil, ErrNotInstalled
	}
	if err := detachable(dir, own); err != nil {
		return nil, err
	}
	if err := detachHooks(dir, own); err != nil {
		return nil, err
	}
	for _, slot := range slots {
		if err := removeSlot(slot); err != nil {
			return nil, fmt.Errorf("slot %d: %w", slot, err)
		}
	}
	return slots, probe.SweepAside()
}

// removeSlot removes everything of a slot but its hooks.
func removeSlot(slot config.Slot) error {
	ours, _, err := listFilters()
	if err != nil {
		return err
	}
	var found []string
	for _, f := range ours {
		if f.Note.Slot == slot {
			found = f.Note.Sysctls
		}
	}
	return errors.Join(
		redirect.RemoveRouting(slot),
		restoreUnlessUsed(slot, found),
		removeFilters(slot), // with them goes the note of what was there before
	)
}

// removeFilters removes the filters of a slot, and each clsact qdisc that is ours and nobody else uses.
func removeFilters(slot config.Slot) error {
	ours, others, err := listFilters()
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range ours {
		if f.Note.Slot != slot {
			others[f.Index]++
		}
	}
	for _, f := range ours {
		switch {
		case f.Note.Slot != slot:
		case f.Note.Clsact && others[f.Index] == 0:
			errs = append(errs, delClsact(f.Index)) // and our filters with it, at once
		default:
			errs = append(errs, delFilter(slot, f.Index, f.Egress))
		}
	}
	return errors.Join(errs...)
}
