// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"context"
	"errors"

	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/probe"
)

// ErrNotInstalled says that there is nothing to remove.
var ErrNotInstalled = errors.New("no packet filter rules of pillion are installed here")

// Remove takes away what Install left in this network namespace, in whatever state it is, and gives back what was there
// before. Where there is nothing, ErrNotInstalled. The caller holds the redirect.Lock.
func Remove(ctx context.Context) error {
	found, err := readState(ctx)
	if err != nil {
		return err
	}
	if len(found) == 0 {
		return ErrNotInstalled
	}
	n, _ := noteOf(found)
	var noted []state // what stays until everything else is gone
	for _, s := range found {
		if s = s.only(chainPolicy); !s.empty() {
			noted = append(noted, s)
		}
	}
	for _, tool := range toolsOf(found, nil) {
		err = errors.Join(err, apply(ctx, tool, found, noted))
	}
	if err = errors.Join(err, leaveTProxy(n)); err != nil {
		return err // the note is still there: Remove can be tried again
	}
	for _, tool := range toolsOf(noted, nil) {
		err = errors.Join(err, apply(ctx, tool, noted, nil))
	}
	return errors.Join(err, unmake(n.Made), probe.SweepAside(), sweepOutside())
}

// leaveTProxy gives back what the backend tproxy changes beside packet filters.
func leaveTProxy(n note) error {
	return errors.Join(redirect.RemoveRouting(n.Slot), redirect.RestoreSysctls(sysctls, n.Sysctls))
}
