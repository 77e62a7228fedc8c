// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"errors"
	"fmt"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/route"
	"golang.org/x/sys/unix"
)

// aside brings what a probe sends, and was not captured, to lo, whatever its address: a rule behind those of all slots,
// for the probe's mark alone.
type aside struct {
	rule  route.Rule
	route route.Route
}

const loIndex = 1 // in every network namespace (net/core/dev.c: it is the first device registered)

func asideOf(f redirect.Family) aside {
	family := unix.AF_INET
	if f == redirect.IPv6 {
		family = unix.AF_INET6
	}
	return aside{
		route.Rule{Family: family, Priority: config.ProbePriority, Mark: config.ProbeMark, Mask: config.ProbeMark, Table: config.ProbeTable},
		route.Route{Family: family, Table: config.ProbeTable, Index: loIndex, Metric: 1},
	}
}

func newAside(f redirect.Family) (aside, error) {
	a := asideOf(f)
	if _, err := route.AddRoute(a.route); err != nil {
		return a, fmt.Errorf("keep the probe on this host: %w", err)
	}
	if _, err := route.AddRule(a.rule); err != nil {
		return a, errors.Join(fmt.Errorf("keep the probe on this host: %w", err), route.DelRoute(a.route))
	}
	return a, nil
}

func (a aside) Close() error { return errors.Join(route.DelRule(a.rule), route.DelRoute(a.route)) }

// sweepAside removes what a probe that was killed left behind.
func sweepAside() error {
	return errors.Join(asideOf(redirect.IPv4).Close(), asideOf(redirect.IPv6).Close())
}
