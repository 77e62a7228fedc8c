// SPDX-License-Identifier: Apache-2.0

package check

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"github.com/pillionproxy/pillion/bpf"
	capture "github.com/pillionproxy/pillion/redirect/ebpf"
	"golang.org/x/sys/unix"
)

func gatherBPF(f Facts) BPF {
	b := BPF{
		Syscall: trySyscall(f), Unprivileged: sysctl("kernel/unprivileged_bpf_disabled"), Lockdown: lockdown(),
		BTF: Answer{State: OK, Detail: "/sys/kernel/btf/vmlinux"}, TCX: tryTCX(f), MemlockKiB: memlock(),
	}
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil {
		b.BTF = Answer{State: Missing, Detail: "no /sys/kernel/btf/vmlinux"}
	}
	spec, err := bpf.LoadCapture()
	if err != nil {
		b.Load = Answer{State: Unknown, Detail: err.Error()}
		return b
	}
	// The limit is this process's own; before Linux 5.11 the probes would fail by it.
	_ = rlimit.RemoveMemlock()
	b.Programs = probeSpec(spec, f)
	b.Load = tryLoad(spec, f)
	return b
}

// trySyscall asks whether bpf(2) lets us in.
func trySyscall(f Facts) Answer {
	switch errno := capture.AskBPF(); {
	case errno == unix.EINVAL:
		return Answer{State: OK, Detail: "allowed"}
	case errno == unix.ENOSYS:
		return Answer{State: Missing, Detail: "ENOSYS: the kernel was built without it, or a seccomp filter says so"}
	case errno == unix.EPERM && (f.Has("CAP_BPF") || f.Has("CAP_SYS_ADMIN")):
		return Answer{State: Missing, Detail: "EPERM in spite of the capability: a seccomp filter or a security module forbids it"}
	case errno == unix.EPERM:
		return Answer{State: Unknown, Detail: "needs CAP_BPF"}
	default:
		return Answer{State: Unknown, Detail: errno.Error()}
	}
}

// probeSpec asks for the program types, helpers and map types of the capture's own object, so that it is always these
// that are asked for.
func probeSpec(spec *ebpf.CollectionSpec, f Facts) []Probe {
	type use struct {
		program ebpf.ProgramType
		helper  asm.BuiltinFunc
	}
	var probes []Probe
	seen := map[use]bool{}
	types := map[ebpf.ProgramType]bool{}
	maps := map[ebpf.MapType]bool{}
	ask := func(name string, err error) { probes = append(probes, Probe{name, featureAnswer(err, f)}) }
	for _, p := range spec.Programs {
		if !types[p.Type] {
			types[p.Type] = true
			ask("program "+programName(p.Type), features.HaveProgramType(p.Type))
		}
		for _, ins := range p.Instructions {
			u := use{p.Type, asm.BuiltinFunc(ins.Constant)}
			if !ins.IsBuiltinCall() || seen[u] {
				continue
			}
			seen[u] = true
			ask(programName(p.Type)+" "+helperName(u.helper), features.HaveProgramHelper(p.Type, u.helper))
		}
	}
	for _, m := range spec.Maps {
		if !maps[m.Type] {
			maps[m.Type] = true
			ask("map "+m.Type.String(), features.HaveMapType(m.Type))
		}
	}
	slices.SortFunc(probes, func(a, b Probe) int { return strings.Compare(a.Name, b.Name) })
	return probes
}

// programName is the type as people who write BPF know it.
func programName(t ebpf.ProgramType) string {
	if t == ebpf.SchedCLS {
		return "tc"
	}
	return strings.ToLower(t.String())
}

// helperName writes FnSkAssign as bpf_sk_assign.
func helperName(f asm.BuiltinFunc) string {
	var b strings.Builder
	b.WriteString("bpf")
	for _, r := range strings.TrimPrefix(f.String(), "Fn") {
		if r >= 'A' && r <= 'Z' {
			b.WriteByte('_')
		}
		b.WriteString(strings.ToLower(string(r)))
	}
	return b.String()
}

func featureAnswer(err error, f Facts) Answer {
	switch {
	case err == nil:
		return Answer{State: OK}
	// Without the right, "not supported" says nothing: it is how a map or a program fails, too, that may not be made.
	case !f.Has("CAP_BPF") && !f.Has("CAP_SYS_ADMIN"):
		return Answer{State: Unknown, Detail: "needs CAP_BPF"}
	case !f.Has("CAP_NET_ADMIN") && !f.Has("CAP_SYS_ADMIN"):
		return Answer{State: Unknown, Detail: "needs CAP_NET_ADMIN"}
	case errors.Is(err, ebpf.ErrNotSupported):
		return Answer{State: Missing, Detail: "the kernel does not have it"}
	default:
		return Answer{State: Unknown, Detail: err.Error()}
	}
}

// tryLoad gives the capture's object to the verifier and lets go of it: nothing is attached.
func tryLoad(spec *ebpf.CollectionSpec, f Facts) Answer {
	c, err := ebpf.NewCollection(spec)
	if err == nil {
		c.Close()
		return Answer{State: OK, Detail: fmt.Sprintf("%d programs pass the verifier", len(spec.Programs))}
	}
	var refused *ebpf.VerifierError
	if errors.As(err, &refused) && !errors.Is(err, unix.EPERM) {
		return Answer{State: Missing, Detail: "the verifier refuses it: " + firstLine(err.Error())}
	}
	return featureAnswer(err, f)
}

// tryTCX asks lo for its programs.
func tryTCX(f Facts) Answer {
	if !f.Has("CAP_NET_ADMIN") && !f.Has("CAP_SYS_ADMIN") {
		return Answer{State: Unknown, Detail: "needs CAP_NET_ADMIN"}
	}
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		return Answer{State: Unknown, Detail: err.Error()}
	}
	_, err = link.QueryPrograms(link.QueryOptions{Target: lo.Index, Attach: ebpf.AttachTCXIngress})
	switch {
	case err == nil:
		return Answer{State: OK, Detail: "there; `run` attaches by it"}
	case errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, unix.EINVAL):
		return Answer{State: Missing, Detail: "the kernel does not have it (before 6.6)"}
	default:
		return Answer{State: Unknown, Detail: missingRight(err, "CAP_NET_ADMIN")}
	}
}

// lockdown is the mode that stands in brackets; empty where it cannot be read.
func lockdown() string {
	b, err := os.ReadFile("/sys/kernel/security/lockdown")
	if err != nil {
		return ""
	}
	_, rest, _ := strings.Cut(string(b), "[")
	mode, _, _ := strings.Cut(rest, "]")
	return mode
}

func memlock() uint64 {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &l); err != nil || l.Max == ^uint64(0) {
		return ^uint64(0)
	}
	return l.Max >> 10
}
