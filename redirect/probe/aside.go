// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"errors"
	"fmt"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/route"
	"golang.org/x/sys/unix"
)

// Aside brings what a probe sends, and was not captured, to lo, whatever its address: a rule behind those of all slots,
// for the probe's mark alone.
type Aside struct {
	rule  route.Rule
	route route.Route
}

const loIndex = 1 // in every network namespace (net/core/dev.c: it is the first device registered)

func asideOf(f redirect.Family) Aside {
	family := unix.AF_INET
	if f == redirect.IPv6 {
		family = unix.AF_INET6
	}
	return Aside{
		route.Rule{Family: family, Priority: config.ProbePriority, Mark: config.ProbeMark, Mask: config.ProbeMark, Table: config.ProbeTable},
		route.Route{Family: family, Table: config.ProbeTable, Index: loIndex, Metric: 1},
	}
}

// NewAside installs it. The caller holds the redirect.Lock.
func NewAside(f redirect.Family) (Aside, error) {
	a := asideOf(f)
	if _, err := route.AddRoute(a.route); err != nil {
		return a, fmt.Errorf("keep the probe on this host: %w", err)
	}
	if _, err := route.AddRule(a.rule); err != nil {
		return a, errors.Join(fmt.Errorf("keep the probe on this host: %w", err), route.DelRoute(a.route))
	}
	return a, nil
}

// Close takes it away.
func (a Aside) Close() error { return errors.Join(route.DelRule(a.rule), route.DelRoute(a.route)) }

// SweepAside removes what a probe that was killed left behind.
func SweepAside() error {
	return errors.Join(asideOf(redirect.IPv4).Close(), asideOf(redirect.IPv6).Close())
}
