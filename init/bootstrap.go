// SPDX-License-Identifier: Apache-2.0

// Package bootstrap is the init step: find the cgroup, plan, install, prove by real connections, report. It is the library
// behind `pillion init`, `pillion clean` and the capture of `pillion run`; the folder is called init, which a Go package
// cannot usefully be.
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
	"strings"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/cgroup"
	"github.com/pillionproxy/pillion/redirect/ebpf"
)

// Options of an installation.
type Options struct {
	ebpf.Options
	Policy config.Capture
	Verify bool // prove the capture before it is final
	// Confirm, if not 0, is how long the capture stays unless it is confirmed. Only Init heeds it.
	Confirm time.Duration
	Log     *slog.Logger
}

// Result is what was done.
type Result struct {
	Plan     redirect.Plan    `json:"plan"`
	Cgroup   string           `json:"cgroup"`
	FoundBy  string           `json:"found_by"` // how the cgroup was found
	Changed  []string         `json:"changed"`
	Replaced bool             `json:"replaced"`
	Checks   []redirect.Check `json:"checks,omitempty"`
	Took     time.Duration    `json:"took"`
	// ConfirmBefore is when the capture is taken back unless it is confirmed; zero: it stays.
	ConfirmBefore time.Time `json:"confirm_before,omitzero"`
}

// target is the cgroup to capture, and whether this process is in it.
type target struct {
	*cgroup.Dir
	foundBy string
	inside  bool
}

func findTarget(path string) (target, error) {
	if path == "" {
		dir, how, err := cgroup.FindPod()
		return target{dir, how, true}, err
	}
	dir, err := cgroup.Open(path)
	if err != nil {
		return target{}, err
	}
	return target{dir, "--cgroup", isInside(dir)}, nil
}

// isInside reports whether this process is in the cgroup or below it.
func isInside(dir *cgroup.Dir) bool {
	own, err := cgroup.OwnDir()
	if err != nil {
		return false
	}
	defer own.Close()
	return own.ID == dir.ID || isBelow(own, dir)
}

func isBelow(dir, other *cgroup.Dir) bool {
	return strings.HasPrefix(dir.Path, strings.TrimSuffix(other.Path, "/")+"/")
}

// MakePlan says what Init would do.
func MakePlan(policy config.Capture) (redirect.Plan, string, error) {
	t, err := findTarget(policy.Cgroup)
	if err != nil {
		return redirect.Plan{}, "", err
	}
	defer t.Close()
	p, err := planFor(policy, t.Dir, redirect.Persistent)
	return p, t.foundBy, err
}

func planFor(policy config.Capture, dir *cgroup.Dir, lifetime redirect.Lifetime) (redirect.Plan, error) {
	if err := ebpf.Supports(policy); err != nil {
		return redirect.Plan{}, err
	}
	host, err := redirect.ReadHost(dir.ID)
	if err != nil {
		return redirect.Plan{}, err
	}
	if host.ExcludedCgroups, err = excludedCgroups(dir, policy.Selection.ExcludeCgroups); err != nil {
		return redirect.Plan{}, err
	}
	policy.Cgroup = dir.Path
	return ebpf.Plan(policy, host, lifetime), nil
}

// excludedCgroups are the ids of cgroups below the captured one.
func excludedCgroups(captured *cgroup.Dir, paths []string) ([]uint64, error) {
	var ids []uint64
	for _, path := range paths {
		dir, err := cgroup.Open(path)
		if err != nil {
			return nil, err
		}
		ids = append(ids, dir.ID)
		below := isBelow(dir, captured)
		if err := dir.Close(); err != nil {
			return nil, err
		}
		if !below {
			return nil, &config.Fault{
				Err:  fmt.Errorf("--exclude-cgroups %s: is not below the captured cgroup %s", path, captured.Path),
				Hint: "what lies outside of it is not captured anyway",
				Exit: config.ExitConfig,
			}
		}
	}
	return ids, nil
}

// Init installs a capture that stays when this process has ended; with o.Confirm, only if Confirm is called in time.
func Init(ctx context.Context, o Options) (Result, error) {
	t, err := findTarget(o.Policy.Cgroup)
	if err != nil {
		return Result{}, err
	}
	defer t.Close()
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
	if o.Confirm == 0 {
		return install(ctx, t, o)
	}
	g := guard{After: o.Confirm, Cgroup: t.Path}
	var found bool
	if g.Previous, found, err = previousPolicy(t.ID, o.Policy.Slot); err != nil {
		return Result{}, err
	}
	r, err := install(ctx, t, o)
	if err != nil || found && !r.Replaced {
		return r, err // what was there already, mended at most
	}
	r.ConfirmBefore = time.Now().Add(o.Confirm)
	if err := startGuard(confirm, g); err != nil {
		release()
		return r, errors.Join(err, g.takeBack(ctx))
	}
	return r, nil
}

// install is Init under the redirect.Lock.
func install(ctx context.Context, t target, o Options) (Result, error) {
	start := time.Now()
	if o.Log != nil {
		warnOfOverlap(o.Log, o.Policy.Shared)
	}
	var err error
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

// Held is the capture of a command: it ends with this process.
type Held struct {
	Plan     redirect.Plan
	Checks   []redirect.Check
	dir      *cgroup.Dir
	capture  *ebpf.Capture
	unfollow func() // stops the mending and waits for it
}

// Hold captures a cgroup for as long as this process lives. It picks a slot that is free and asks prepare for what the
// capture and the proxy then agree on: the proxy's listeners are open before anything is captured. Until Close, it mends
// what others undo, and takes in interfaces that come.
func Hold(ctx context.Context, o Options, prepare func(config.Slot) (config.Shared, error)) (*Held, error) {
	t, err := findTarget(o.Policy.Cgroup)
	if err != nil {
		return nil, err
	}
	h := &Held{dir: t.Dir}
	if err := h.install(ctx, t, o, prepare); err != nil {
		return nil, errors.Join(err, t.Close())
	}
	h.follow(o.Log)
	if o.Verify {
		if h.Checks, err = verifyLocked(ctx, t, h.Plan.Policy); err != nil {
			return nil, errors.Join(err, h.Close())
		}
	}
	return h, nil
}

// verifyLocked takes the redirect.Lock for a verify.
func verifyLocked(ctx context.Context, t target, policy config.Capture) ([]redirect.Check, error) {
	release, err := redirect.Lock(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	return verify(ctx, t, policy)
}

func (h *Held) follow(log *slog.Logger) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := h.capture.Follow(ctx, log); err != nil {
			log.Error("changes of the network namespace are no longer followed", "error", err)
		}
	}()
	h.unfollow = func() { cancel(); <-done }
}

func (h *Held) install(ctx context.Context, t target, o Options, prepare func(config.Slot) (config.Shared, error)) error {
	release, err := redirect.Lock(ctx)
	if err != nil {
		return err
	}
	defer release()
	slot, err := ebpf.FreeSlot()
	if err != nil {
		return err
	}
	if o.Policy.Shared, err = prepare(slot); err != nil {
		return err
	}
	if h.Plan, err = planFor(o.Policy, t.Dir, redirect.Held); err != nil {
		return err
	}
	h.capture, err = ebpf.Hold(h.Plan, t.Dir, o.Without)
	return err
}

// Counters reads the count of each verdict.
func (h *Held) Counters() (map[string]uint64, error) { return h.capture.Counters() }

// Close takes the capture away.
func (h *Held) Close() error {
	h.unfollow()
	return errors.Join(h.capture.Close(), h.dir.Close())
}

// Clean takes away every capture of the cgroup in this network namespace.
func Clean(ctx context.Context, path string) error {
	t, err := findTarget(path)
	if err != nil {
		return err
	}
	defer t.Close()
	release, err := redirect.Lock(ctx)
	if err != nil {
		return err
	}
	defer release()
	_, err = ebpf.Remove(t.Dir)
	if errors.Is(err, ebpf.ErrNotInstalled) {
		return &config.Fault{
			Err:  fmt.Errorf("cgroup %s: %w", t.Path, err),
			Hint: "`pillion status` shows every capture of this network namespace; enter the namespace of the pod or command first (nsenter --net)",
		}
	}
	return err
}

// Verify proves the capture of a cgroup by real connections.
func Verify(ctx context.Context, policy config.Capture) ([]redirect.Check, error) {
	t, err := findTarget(policy.Cgroup)
	if err != nil {
		return nil, err
	}
	defer t.Close()
	return verifyLocked(ctx, t, policy)
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
