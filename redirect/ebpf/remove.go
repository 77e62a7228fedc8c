// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"errors"
	"fmt"
	"slices"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/cgroup"
	"github.com/pillionproxy/pillion/redirect/route"
	"golang.org/x/sys/unix"
)

// ErrNotInstalled says that there is nothing to remove.
var ErrNotInstalled = errors.New("nothing of pillion is installed here")

// Removal says what Remove did.
type Removal struct {
	Slots []config.Slot // those removed
	Left  int           // programs that may not be detached; they end with their cgroup
}

// Remove takes away every Persistent capture of the cgroup in this network namespace, and gives back what was there
// before: hooks first, then filters, rules, routes and sysctls. It is done again safely. Where there is nothing,
// ErrNotInstalled. The caller holds the redirect.Lock.
func Remove(dir *cgroup.Dir) (Removal, error) {
	var r Removal
	ours, _, err := listFilters()
	if err != nil {
		return r, err
	}
	var known []uint32
	for _, f := range ours {
		known = append(known, f.Note.Hooks...)
		if f.Note.CgroupID == dir.ID && !slices.Contains(r.Slots, f.Note.Slot) {
			r.Slots = append(r.Slots, f.Note.Slot)
		}
	}
	orphans := orphanHooks(dir, known)
	if len(r.Slots) == 0 && len(orphans) == 0 {
		return r, ErrNotInstalled
	}
	if r.Left, err = detachHooks(dir, orphans); err != nil {
		return r, err
	}
	for _, slot := range r.Slots {
		left, err := removeSlot(slot, dir)
		r.Left += left
		if err != nil {
			return r, fmt.Errorf("slot %d: %w", slot, err)
		}
	}
	return r, nil
}

func removeSlot(slot config.Slot, dir *cgroup.Dir) (left int, err error) {
	ours, others, err := listFilters()
	if err != nil {
		return 0, err
	}
	var found []string
	for _, f := range ours {
		if f.Note.Slot != slot {
			continue
		}
		found = f.Note.Sysctls
		n, err := detachHooks(dir, f.Note.Hooks)
		left = max(left, n)
		if err != nil {
			return left, err
		}
	}
	return left, errors.Join(
		removeRules(slot), removeRoutes(slot),
		removeFilters(slot, ours, others),
		restoreUnlessUsed(slot, found),
	)
}

// removeFilters removes the filters of a slot, and each clsact qdisc that is ours and nobody else uses.
func removeFilters(slot config.Slot, ours []attached, others map[int]int) error {
	var errs []error
	for _, f := range ours {
		if f.Note.Slot != slot {
			others[f.Index]++
		}
	}
	removed := make(map[int]bool)
	for _, f := range ours {
		if f.Note.Slot != slot {
			continue
		}
		errs = append(errs, delFilter(slot, f.Index, f.Egress))
		removed[f.Index] = removed[f.Index] || f.Note.Clsact
	}
	for index, mine := range removed {
		if mine && others[index] == 0 {
			errs = append(errs, delClsact(index))
		}
	}
	return errors.Join(errs...)
}

func removeRules(slot config.Slot) error {
	var errs []error
	for _, f := range []redirect.Family{redirect.IPv4, redirect.IPv6} {
		for _, r := range rules(slot, f) {
			errs = append(errs, route.DelRule(netRule(r)))
		}
	}
	return errors.Join(errs...)
}

func removeRoutes(slot config.Slot) error {
	var errs []error
	for _, f := range []int{unix.AF_INET, unix.AF_INET6} {
		for _, table := range []int{slot.TableCapture(), slot.TableClosed()} {
			rs, err := route.Routes(f, table)
			errs = append(errs, err)
			for _, r := range rs {
				errs = append(errs, route.DelRoute(r))
			}
		}
	}
	return errors.Join(errs...)
}
