// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/pillionproxy/pillion/bpf"
	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/cgroup"
	"golang.org/x/sys/unix"
)

// Options of an installation.
type Options struct {
	Without             bpf.CaptureCure // cures taken out, for tests
	IgnoreOpenListeners bool            // leave listeners uncaptured that are older than the capture and cannot be adopted
}

// Outcome says what an installation did.
type Outcome struct {
	Changed  []string // what was not there before; empty: the very capture was there, whole
	Replaced bool     // an earlier capture of the slot was replaced
}

// Installation is an installed capture that may still be taken back: it ends with Commit or Rollback.
type Installation struct {
	Outcome
	in  *installer
	old previous
}

// Install installs a Persistent plan. Installing what is there already changes nothing; a capture of another policy on
// the same cgroup is replaced, without a moment uncaptured; a failure leaves the host as it was. The caller holds the
// redirect.Lock.
func Install(plan redirect.Plan, dir *cgroup.Dir, o Options) (*Installation, error) {
	hash, err := planHash(plan, o.Without)
	if err != nil {
		return nil, err
	}
	old, err := earlier(plan.Policy.Slot, dir)
	if err != nil {
		return nil, err
	}
	in := &installer{plan: plan, dir: dir}
	if old.complete() && old.note.Plan == hash && old.hasFilters(plan.Filters) {
		if err := in.mend(); err != nil {
			return nil, errors.Join(err, in.Rollback())
		}
		return &Installation{Outcome: Outcome{Changed: in.Changed}, in: in}, nil
	}
	if old.captures {
		if err := detachable(dir, old.attached); err != nil {
			return nil, fmt.Errorf("cgroup %s is captured already, by another policy or not wholly, and must be captured anew: %w", dir.Path, err)
		}
	}
	makers, err := old.makers()
	if err != nil {
		return nil, err
	}
	if makers != nil {
		defer makers.Close()
	}
	if in.objects, err = load(plan, o.Without, makers); err != nil {
		return nil, err
	}
	in.OnRollback(func() error { in.objects.Close(); return nil })
	if err := in.replace(old, hash); err != nil {
		return nil, errors.Join(err, in.Rollback())
	}
	err = adopt(dir, in.objects.Maps[bpf.CaptureMapMakers], plan.Policy)
	if err != nil && !o.IgnoreOpenListeners {
		return nil, errors.Join(err, in.Rollback())
	}
	return &Installation{Outcome: Outcome{Changed: in.Changed, Replaced: old.captures}, in: in, old: old}, nil
}

// Commit makes the installation final: what it replaced goes.
func (i *Installation) Commit() error {
	if i.in.objects != nil {
		defer i.in.objects.Close()
	}
	if !i.old.captures {
		return nil // programs of an incomplete installation mark nothing; they may not be ours to detach
	}
	return detachHooks(i.in.dir, i.old.attached)
}

// Rollback leaves the host as it was before Install.
func (i *Installation) Rollback() error { return i.in.Rollback() }

// previous is what was found of a capture in the slot.
type previous struct {
	found    bool
	note     note
	filters  []attached
	missing  []redirect.Hook
	attached []uint32 // its programs that are on the cgroup now
	captures bool     // the hook that marks is among them
}

func earlier(slot config.Slot, dir *cgroup.Dir) (previous, error) {
	var p previous
	held, err := claimed()
	if err != nil {
		return p, err
	}
	if _, ok := held[slot]; ok {
		return p, &config.Fault{Err: fmt.Errorf("slot %d is in use by a running `pillion run`", slot), Hint: "give another one with --slot"}
	}
	ours, _, err := listFilters()
	if err != nil {
		return p, err
	}
	for _, f := range ours {
		if f.Note.Slot == slot {
			p.filters = append(p.filters, f)
			p.found, p.note = true, f.Note
		}
	}
	if !p.found {
		return p, nil
	}
	if p.note.CgroupID != dir.ID {
		if path := cgroup.PathOf(p.note.CgroupID); path != "" {
			return p, &config.Fault{
				Err:  fmt.Errorf("slot %d of this network namespace captures another cgroup already: %s", slot, path),
				Hint: fmt.Sprintf("take it away with `pillion clean --cgroup %s`, or give this one another slot with --slot", path),
			}
		}
		p.missing = hooks // its cgroup is gone, and its programs with it
		return p, nil
	}
	if p.missing, err = missingHooks(dir, p.note); err != nil {
		return p, err
	}
	for i, h := range hooks {
		if i < len(p.note.Hooks) && !slices.ContainsFunc(p.missing, func(m redirect.Hook) bool { return m.Attach == h.Attach }) {
			p.attached = append(p.attached, p.note.Hooks[i])
			p.captures = i == len(hooks)-1
		}
	}
	return p, nil
}

func (p previous) complete() bool { return p.found && len(p.missing) == 0 }

func (p previous) filterAt(f redirect.Filter) (attached, bool) {
	i := slices.IndexFunc(p.filters, func(a attached) bool { return a.Index == f.Index && a.Egress == f.Egress })
	if i < 0 {
		return attached{}, false
	}
	return p.filters[i], true
}

func (p previous) hasFilters(want []redirect.Filter) bool {
	return !slices.ContainsFunc(want, func(f redirect.Filter) bool { _, ok := p.filterAt(f); return !ok })
}

// makers is the map of the replaced capture that says who made which socket: listeners of the app must stay known. nil
// where nothing is replaced.
func (p previous) makers() (*ebpf.Map, error) {
	if !p.captures {
		return nil, nil
	}
	return mapOf(p.attached[len(p.attached)-1], bpf.CaptureMapMakers)
}

// installer carries one installation.
type installer struct {
	redirect.Journal
	plan    redirect.Plan
	dir     *cgroup.Dir
	objects *ebpf.Collection
	held    map[heldFilter]bool // filters attached by links
	found   []string            // sysctls from before any capture, for the notes of a Held plan
}

// mend adds what is missing of a capture whose programs are all in place.
func (in *installer) mend() error {
	return errors.Join(in.sysctls(nil), in.routes(), in.rules())
}

// replace installs everything, filters first: they carry the note of what was there before.
func (in *installer) replace(old previous, hash string) error {
	found, err := foundSysctls()
	if err != nil {
		return err
	}
	n := note{
		Slot: in.plan.Policy.Slot, Plan: hash, CgroupID: in.dir.ID, Sysctls: found, Ports: in.plan.Policy.Listeners,
		Down: [2]config.FailureMode{in.plan.Policy.OnProxyDown, in.plan.Policy.OnProxyDownInbound},
		Dial: in.plan.Policy.DialInbound, Fixed: len(in.plan.Sysctls) == 0,
	}
	for _, h := range hooks {
		id, err := programID(in.objects.Programs[h.Program])
		if err != nil {
			return err
		}
		n.Hooks = append(n.Hooks, id)
	}
	for _, step := range []func() error{
		func() error { return in.filters(n, old) },
		func() error { return in.sysctls(found) },
		in.routes,
		in.rules,
		in.hooks,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func programID(p *ebpf.Program) (uint32, error) {
	info, err := p.Info()
	if err != nil {
		return 0, fmt.Errorf("read the id of a program: %w", err)
	}
	id, _ := info.ID()
	return uint32(id), nil
}

func (in *installer) filters(n note, old previous) error {
	ours, _, err := listFilters()
	if err != nil {
		return err
	}
	there := previous{filters: slices.DeleteFunc(slices.Clone(ours), func(a attached) bool { return a.Note.Slot != n.Slot || a.Note.Plan != n.Plan })}
	ourClsact := make(map[int]bool)
	for _, a := range ours {
		ourClsact[a.Index] = ourClsact[a.Index] || a.Note.Clsact
	}
	for _, f := range in.plan.Filters {
		if _, ok := there.filterAt(f); ok && n.Plan == heldPlan {
			continue
		}
		had, err := hasClsact(f.Index)
		if err != nil {
			return err
		}
		// Two sides and several slots share the qdisc: that it is ours to remove is in every note on the interface.
		ourClsact[f.Index] = ourClsact[f.Index] || !had
		n.Clsact = ourClsact[f.Index]
		err = putFilter(n.Slot, f, in.objects.Programs[f.Program].FD(), n, !had)
		if errors.Is(err, unix.ENODEV) {
			continue // the interface vanished since the plan was made
		}
		if err != nil {
			return err
		}
		if !had {
			in.OnRollback(func() error { return delClsact(f.Index) })
		}
		err = in.Did(fmt.Sprintf("filter %s %s", f.Link, f.Direction()), func() error {
			if was, ok := old.filterAt(f); ok {
				return putBack(f, was)
			}
			return delFilter(n.Slot, f.Index, f.Egress)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// putBack restores a filter that was replaced.
func putBack(f redirect.Filter, was attached) error {
	p, err := ebpf.NewProgramFromID(ebpf.ProgramID(was.Program))
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOENT) {
		return delFilter(was.Note.Slot, f.Index, f.Egress) // of an incomplete installation: it captured nothing
	}
	if err != nil {
		return err
	}
	defer p.Close()
	return putFilter(was.Note.Slot, f, p.FD(), was.Note, false)
}

func (in *installer) sysctls(found []string) error {
	return in.Sysctls(in.plan.Sysctls, func() error { return restoreUnlessUsed(in.plan.Policy.Slot, found) })
}

func (in *installer) routes() error { return in.Routes(in.plan.Routes) }

func (in *installer) rules() error { return in.Rules(in.plan.Rules) }

func (in *installer) hooks() error {
	for _, h := range in.plan.Hooks {
		p := in.objects.Programs[h.Program]
		if err := attachHook(in.dir, h, p); err != nil {
			return err
		}
		if err := in.Did("hook "+h.Attach, func() error { return detachOwn(in.dir, h, p) }); err != nil {
			return err
		}
	}
	return nil
}
