// SPDX-License-Identifier: Apache-2.0

// Package bootstrap is the init step: plan, install, prove by real connections, report, by whichever backend the host
// allows. It is the library behind `pillion init`, `pillion clean` and the capture of `pillion run`; the folder is called
// init, which a Go package cannot usefully be.
//
// What always holds: a capture that could not be proven is not left behind, and the caller gets the error; and while
// the capture of a network namespace is changed, its lock is held.
package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/ebpf"
	"github.com/pillionproxy/pillion/redirect/iptables"
)

// Options of an installation.
type Options struct {
	ebpf.Options
	Backend Backend          // empty: Auto
	Flavour iptables.Flavour // of the packet filter, for backends that use one; empty: auto
	// Untracked takes connections for not tracked by the kernel even where they are, for tests.
	Untracked bool
	Policy    config.Capture
	Verify    bool // prove the capture before it is final
	// Confirm, if not 0, is how long the capture stays unless it is confirmed. Only Init heeds it.
	Confirm time.Duration
	Log     *slog.Logger // nil: none
}

// Result is what was done.
type Result struct {
	Plan     redirect.Plan    `json:"plan"`
	Refused  []Refusal        `json:"refused,omitempty"` // backends that were tried before
	Cgroup   string           `json:"cgroup,omitempty"`
	FoundBy  string           `json:"found_by,omitempty"` // how the cgroup was found
	Changed  []string         `json:"changed"`
	Replaced bool             `json:"replaced"`
	Checks   []redirect.Check `json:"checks,omitempty"`
	Took     time.Duration    `json:"took"`
	// ConfirmBefore is when the capture is taken back unless it is confirmed; zero: it stays.
	ConfirmBefore time.Time `json:"confirm_before,omitzero"`
}

// Refusal is a backend that could not be taken.
type Refusal struct {
	Backend Backend `json:"backend"`
	Reason  string  `json:"reason"`
	Hint    string  `json:"hint,omitempty"`
}

// MakePlan says what Init would do, by the first backend that can do it.
func MakePlan(ctx context.Context, o Options) (Result, error) {
	return first(o, func(b capturer) (r Result, err error) {
		r.Plan, r.FoundBy, err = b.plan(ctx, o)
		return r, err
	})
}

// Init installs a capture that stays when this process has ended; with o.Confirm, only if Confirm is called in time.
func Init(ctx context.Context, o Options) (Result, error) {
	release, err := redirect.Lock(ctx)
	if err != nil {
		return Result{}, err
	}
	defer release()
	// Also if nothing is to be confirmed: what waits for it would be taken back together with this.
	confirm, err := reserveConfirm()
	if err != nil {
		return Result{}, err
	}
	defer confirm.Close()
	if o.Log != nil {
		warnOfOverlap(o.Log, o.Policy.Shared)
	}
	return first(o, func(b capturer) (Result, error) {
		if o.Confirm == 0 {
			return b.install(ctx, o)
		}
		g := guard{After: o.Confirm, Backend: b.name(), Flavour: o.Flavour, Cgroup: o.Policy.Cgroup}
		found, err := g.remember(ctx, b, o.Policy)
		if err != nil {
			return Result{}, err
		}
		r, err := b.install(ctx, o)
		if err != nil || found && !r.Replaced {
			return r, err // what was there already, mended at most
		}
		r.ConfirmBefore = time.Now().Add(o.Confirm)
		if err := startGuard(confirm, g); err != nil {
			return r, errors.Join(err, g.takeBack(ctx))
		}
		return r, nil
	})
}

// Clean takes away what init installed in this network namespace: the capture of the cgroup, or, where path is empty, the
// one that there is.
func Clean(ctx context.Context, path string) error {
	release, err := redirect.Lock(ctx)
	if err != nil {
		return err
	}
	defer release()
	if path == "" {
		if err := iptables.Remove(ctx); !errors.Is(err, iptables.ErrNotInstalled) {
			return err
		}
		if path, err = onlyCgroup(); err != nil {
			return err
		}
	}
	return ebpfCapturer{}.remove(ctx, path)
}

// onlyCgroup is the cgroup that is captured here, if it is one alone; "" if the pod's has to be looked for.
func onlyCgroup() (string, error) {
	reports, err := ebpf.Inspect()
	if err != nil {
		return "", err
	}
	switch len(reports) {
	case 0:
		return "", &config.Fault{
			Err:  ebpf.ErrNotInstalled,
			Hint: "another network namespace may have it: enter that first (nsenter --net)",
		}
	case 1:
		return reports[0].Cgroup, nil
	}
	return "", nil
}

// Verify proves a capture by real connections.
func Verify(ctx context.Context, backend Backend, policy config.Capture) ([]redirect.Check, error) {
	release, err := redirect.Lock(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	return capturerOf(backend).verify(ctx, policy)
}

// Inspect reports every capture of this network namespace.
func Inspect(ctx context.Context) ([]redirect.Report, error) {
	reports, err := ebpf.Inspect()
	if err != nil {
		return nil, err
	}
	more, err := iptables.Inspect(ctx)
	return append(reports, more...), err
}

// warnOfOverlap tells when the app may be given a port from which the proxy dials.
func warnOfOverlap(log *slog.Logger, s config.Shared) {
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		return
	}
	var first, last uint16
	if _, err := fmt.Sscan(string(b), &first, &last); err != nil {
		return
	}
	app := config.PortRange{First: first, Last: last}
	for name, r := range map[string]config.PortRange{"--dial-outbound": s.DialOutbound, "--dial-inbound": s.DialInbound} {
		if r.Overlaps(app) {
			log.Warn("the proxy's dials and the app share source ports; under many connections the app may find none",
				"flag", name, "range", r.String(), "net.ipv4.ip_local_port_range", app.String())
		}
	}
}
