// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"fmt"
	"slices"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect/route"
	"golang.org/x/sys/unix"
)

// Journal carries one installation: every change that succeeds leaves its undoing. The zero value is ready.
type Journal struct {
	Changed []string // what was not there before

	undo   []func() error
	undoes map[string]bool // what undo covers
}

// Interrupt, if not nil, is called after the change of a number, from 1, of each Journal, for tests: its error ends the
// installation there.
var Interrupt func(change int) error

// Did notes a change and how to undo it; nil where OnRollback knows that already. What is done a second time, because
// somebody undid it, is undone once. Its error is that of Interrupt.
func (j *Journal) Did(what string, undo func() error) error {
	j.Changed = append(j.Changed, what)
	if undo != nil && !j.undoes[what] {
		if j.undoes == nil {
			j.undoes = make(map[string]bool)
		}
		j.undoes[what] = true
		j.OnRollback(undo)
	}
	if Interrupt != nil {
		return Interrupt(len(j.Changed))
	}
	return nil
}

// OnRollback adds something to undo that is no change by itself.
func (j *Journal) OnRollback(undo func() error) { j.undo = append(j.undo, undo) }

// Rollback undoes everything, last first. It goes on after an error and reports them all.
func (j *Journal) Rollback() error {
	var errs []error
	for _, undo := range slices.Backward(j.undo) {
		if err := undo(); err != nil {
			errs = append(errs, fmt.Errorf("undo: %w", err))
		}
	}
	j.undo = nil
	return errors.Join(errs...)
}

// Sysctls gives kernel parameters their values; restore gives all of them back.
func (j *Journal) Sysctls(want []Sysctl, restore func() error) error {
	for _, s := range want {
		changed, err := s.set()
		if err != nil {
			return err
		}
		if changed {
			if err := j.Did("sysctl "+s.Name, restore); err != nil {
				return err
			}
		}
	}
	return nil
}

// Routes adds the routes that are missing.
func (j *Journal) Routes(want []Route) error {
	for _, r := range want {
		n := r.netlink()
		added, err := route.AddRoute(n)
		if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENETDOWN) {
			continue // the interface went away since the plan was made
		}
		if err != nil {
			return routeFault(err)
		}
		if added {
			what := fmt.Sprintf("IPv%d route of table %d dev %s", r.Family, r.Table, r.Link)
			if err := j.Did(what, func() error { return route.DelRoute(n) }); err != nil {
				return err
			}
		}
	}
	return nil
}

// Rules adds the rules that are missing.
func (j *Journal) Rules(want []Rule) error {
	for _, r := range want {
		n := r.netlink()
		added, err := route.AddRule(n)
		if err != nil {
			return routeFault(err)
		}
		if added {
			what := fmt.Sprintf("IPv%d rule %d", r.Family, r.Priority)
			if err := j.Did(what, func() error { return route.DelRule(n) }); err != nil {
				return err
			}
		}
	}
	return nil
}

func routeFault(err error) error {
	if errors.Is(err, unix.EPERM) {
		return &config.Fault{Err: err, Hint: "it takes CAP_NET_ADMIN in the network namespace", Exit: config.ExitNoPerm}
	}
	return err
}
