// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"context"
	"errors"
	"log/slog"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/cgroup"
	"github.com/pillionproxy/pillion/redirect/ebpf"
)

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
		if h.Checks, err = verifyHeld(ctx, t, h.Plan.Policy); err != nil {
			return nil, errors.Join(err, h.Close())
		}
	}
	return h, nil
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

// verifyHeld takes the redirect.Lock for a verify.
func verifyHeld(ctx context.Context, t target, policy config.Capture) ([]redirect.Check, error) {
	release, err := redirect.Lock(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	return verify(ctx, t, policy)
}
