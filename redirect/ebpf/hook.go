// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/cgroup"
	"golang.org/x/sys/unix"
)

var attachTypes = map[string]ebpf.AttachType{
	"sock_create": ebpf.AttachCGroupInetSockCreate,
	"post_bind4":  ebpf.AttachCGroupInet4PostBind,
	"post_bind6":  ebpf.AttachCGroupInet6PostBind,
	"connect4":    ebpf.AttachCGroupInet4Connect,
	"connect6":    ebpf.AttachCGroupInet6Connect,
	"sock_ops":    ebpf.AttachCGroupSockOps,
}

// attachHook attaches a program that stays when this process ends.
func attachHook(dir *cgroup.Dir, h redirect.Hook, p *ebpf.Program) error {
	err := link.RawAttachProgram(link.RawAttachProgramOptions{Target: int(dir.Fd()), Program: p, Attach: attachTypes[h.Attach], Flags: unix.BPF_F_ALLOW_MULTI})
	return hookFault(err, dir, h)
}

// holdHook attaches a program that goes with this process.
func holdHook(dir *cgroup.Dir, h redirect.Hook, p *ebpf.Program) (link.Link, error) {
	l, err := link.AttachCgroup(link.CgroupOptions{Path: dir.Path, Attach: attachTypes[h.Attach], Program: p})
	return l, hookFault(err, dir, h)
}

func hookFault(err error, dir *cgroup.Dir, h redirect.Hook) error {
	if err == nil {
		return nil
	}
	f := &config.Fault{Err: fmt.Errorf("attach %s to %s of cgroup %s: %w", h.Program, h.Attach, dir.Path, err)}
	if errors.Is(err, unix.EPERM) {
		f.Exit = config.ExitUnavailable
		f.Hint = "a cgroup above or this one holds an exclusive BPF program (bpftool cgroup tree shows it), or CAP_NET_ADMIN is missing"
	}
	return f
}

// queryHooks lists the programs on one hook of the cgroup, others' among them. It takes no more than CAP_NET_ADMIN.
func queryHooks(dir *cgroup.Dir, h redirect.Hook) ([]uint32, error) {
	res, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: attachTypes[h.Attach]})
	if err != nil {
		return nil, fmt.Errorf("query %s of cgroup %s: %w", h.Attach, dir.Path, err)
	}
	ids := make([]uint32, len(res.Programs))
	for i, p := range res.Programs {
		ids[i] = uint32(p.ID)
	}
	return ids, nil
}

// missingHooks are the hooks of a note that are not on the cgroup.
func missingHooks(dir *cgroup.Dir, n note) ([]redirect.Hook, error) {
	var missing []redirect.Hook
	for i, h := range hooks {
		ids, err := queryHooks(dir, h)
		if err != nil {
			return nil, err
		}
		if i >= len(n.Hooks) || !slices.Contains(ids, n.Hooks[i]) {
			missing = append(missing, h)
		}
	}
	return missing, nil
}

// detachable reports, as a fault, whether those of the programs that are on the cgroup may be detached. It takes the
// program's descriptor, which by id is had with CAP_SYS_ADMIN only.
func detachable(dir *cgroup.Dir, ids []uint32) error {
	for _, h := range hooks {
		have, err := queryHooks(dir, h)
		if err != nil {
			return err
		}
		for _, id := range have {
			if slices.Contains(ids, id) && programName(id) == "" {
				return &config.Fault{
					Err:  fmt.Errorf("the programs on cgroup %s may not be detached", dir.Path),
					Hint: "it takes CAP_SYS_ADMIN beside CAP_BPF and CAP_NET_ADMIN; without it they end with their cgroup (in a pod: with the pod)",
					Exit: config.ExitNoPerm,
				}
			}
		}
	}
	return nil
}

// detachHooks takes those of the programs that are on the cgroup off it, the one that marks first.
func detachHooks(dir *cgroup.Dir, ids []uint32) error {
	for _, h := range slices.Backward(hooks) {
		have, err := queryHooks(dir, h)
		if err != nil {
			return err
		}
		for _, id := range have {
			if !slices.Contains(ids, id) {
				continue
			}
			if err := detachHook(dir, h, id); err != nil {
				return err
			}
		}
	}
	return nil
}

func detachHook(dir *cgroup.Dir, h redirect.Hook, id uint32) error {
	p, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
	if err != nil {
		return fmt.Errorf("open program %d: %w", id, err)
	}
	defer p.Close()
	return detachOwn(dir, h, p)
}

// detachOwn detaches a program that this process loaded.
func detachOwn(dir *cgroup.Dir, h redirect.Hook, p *ebpf.Program) error {
	err := link.RawDetachProgram(link.RawDetachProgramOptions{Target: int(dir.Fd()), Program: p, Attach: attachTypes[h.Attach]})
	if err != nil {
		return fmt.Errorf("detach %s from %s: %w", h.Program, h.Attach, err)
	}
	return nil
}

// orphanHooks are programs on the cgroup that carry our names but stand in no note: what an installer left that was
// killed, or whose filters somebody removed. Where names may not be read (CAP_SYS_ADMIN), there are none to be seen.
func orphanHooks(dir *cgroup.Dir, known []uint32) []uint32 {
	var orphans []uint32
	for _, h := range hooks {
		ids, err := queryHooks(dir, h)
		if err != nil {
			continue
		}
		for _, id := range ids {
			if !slices.Contains(known, id) && programName(id) == h.Program {
				orphans = append(orphans, id)
			}
		}
	}
	return orphans
}

// programName is the name of a loaded program, "" where it may not be read.
func programName(id uint32) string {
	p, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
	if err != nil {
		return ""
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return ""
	}
	return strings.TrimRight(info.Name, "\x00")
}

// mapOf opens a map of a loaded program by its name. It takes CAP_SYS_ADMIN.
func mapOf(program uint32, name string) (*ebpf.Map, error) {
	p, err := ebpf.NewProgramFromID(ebpf.ProgramID(program))
	if err != nil {
		return nil, err
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return nil, err
	}
	ids, _ := info.MapIDs()
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			return nil, err
		}
		if mi, err := m.Info(); err == nil && mi.Name == name {
			return m, nil
		}
		m.Close()
	}
	return nil, fmt.Errorf("program %d has no map %s", program, name)
}
