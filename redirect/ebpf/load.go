// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"errors"
	"fmt"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/rlimit"
	"github.com/pillionproxy/pillion/bpf"
	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// load brings the capture's programs into the kernel, with the policy as their constants: the fast form where this process
// and the kernel allow it, else the one that loads everywhere. makers, if not nil, takes the place of the map that says who
// made which socket. The caller closes the collection.
func load(plan redirect.Plan, without bpf.CaptureCure, makers *ebpf.Map) (*ebpf.Collection, error) {
	raised := rlimit.RemoveMemlock()
	var options ebpf.CollectionOptions
	if makers != nil {
		options.MapReplacements = map[string]*ebpf.Map{bpf.CaptureMapMakers: makers}
	}
	l := loader{policy: plan.Policy, selector: newSelector(plan.Policy.Selection, plan.ExcludedCgroups), options: options}
	l.constants = settings(plan.Policy, l.selector, without)
	if mayReadKernel() {
		if c, err := l.load(bpf.LoadFast); err == nil {
			return c, nil
		}
	}
	c, err := l.load(bpf.LoadCapture)
	if err != nil {
		return nil, loadFault(err, raised)
	}
	return c, nil
}

// loader is what makes an object of the two the capture of one policy.
type loader struct {
	policy    config.Capture
	constants bpf.CaptureSettings
	selector  selector
	options   ebpf.CollectionOptions
}

func (l loader) load(read func() (*ebpf.CollectionSpec, error)) (*ebpf.Collection, error) {
	spec, err := read()
	if err != nil {
		return nil, fmt.Errorf("read the BPF object: %w", err)
	}
	if err := spec.Variables[bpf.CaptureVarCfg].Set(l.constants); err != nil {
		return nil, fmt.Errorf("set the BPF constants: %w", err)
	}
	spec.Maps[bpf.CaptureMapSelection].MaxEntries = max(1, uint32(len(l.selector.entries)))
	c, err := ebpf.NewCollectionWithOptions(spec, l.options)
	if err != nil {
		return nil, err
	}
	err = errors.Join(l.selector.fill(c.Maps[bpf.CaptureMapSelection]), bindPolicy(c.Programs[bpf.CaptureProgPlnSockops], l.policy))
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// mayReadKernel reports whether programs of this process may read kernel memory.
func mayReadKernel() bool {
	return holds(cap.PERFMON) || holds(cap.SYS_ADMIN)
}

func holds(c cap.Value) bool {
	ok, err := cap.GetProc().GetFlag(cap.Effective, c)
	return err == nil && ok
}

func settings(p config.Capture, s selector, without bpf.CaptureCure) bpf.CaptureSettings {
	trust := uint32(0)
	if p.TrustProxyUser {
		trust = 1
	}
	return bpf.CaptureSettings{
		TrustUser:    trust,
		Shift:        p.Slot.Shift(),
		ModeOut:      bpf.CaptureFailureMode(p.OnProxyDown),
		ModeIn:       bpf.CaptureFailureMode(p.OnProxyDownInbound),
		ProxyUid:     p.ProxyUID,
		PortOut:      uint32(p.Listeners.Outbound),
		PortIn:       uint32(p.Listeners.Inbound),
		PortInOwn:    uint32(p.Listeners.InboundOwn),
		PortAdmin:    uint32(config.PortAdmin),
		PortHealth:   uint32(config.PortHealth),
		DialOutFirst: uint32(p.DialOutbound.First),
		DialOutLast:  uint32(p.DialOutbound.Last),
		DialInFirst:  uint32(p.DialInbound.First),
		DialInLast:   uint32(p.DialInbound.Last),
		Selects:      s.kinds,
		Includes:     s.includes,
		Without:      without,
	}
}

// loadFault explains a load that failed. raised is what rlimit.RemoveMemlock said: before Linux 5.11 maps and programs count
// against RLIMIT_MEMLOCK, those of every process of this user id on the machine together, and lifting it takes
// CAP_SYS_RESOURCE. Newer kernels need none of it, and it is nil there.
func loadFault(err, raised error) error {
	f := &config.Fault{Err: fmt.Errorf("load the BPF programs: %w", err), Exit: config.ExitUnavailable}
	var refused *ebpf.VerifierError
	switch {
	case errors.As(err, &refused):
		f.Hint = "this kernel's verifier refuses the object; Linux 5.10 or newer is needed"
	case errors.Is(err, unix.EPERM) && errors.Is(AskBPF(), unix.EPERM) && hasBPF():
		f.Exit = config.ExitNoPerm
		f.Hint = "CAP_BPF is held, and bpf(2) is forbidden all the same, by a seccomp profile or a security module. In a pod: seccompProfile type Unconfined for this init container (`pillion inject --init-seccomp Unconfined`); containerd 1.7, CRI-O 1.27 and newer allow it with CAP_BPF by themselves"
	case raised != nil && errors.Is(err, unix.EPERM):
		f.Exit = config.ExitNoPerm
		f.Hint = fmt.Sprintf("the limit of locked memory (RLIMIT_MEMLOCK, %s here) is too low: before Linux 5.11 it counts all BPF of this user id on the machine. Add CAP_SYS_RESOURCE, with which pillion lifts it for itself, or raise it to some MiB (ulimit -l, LimitMEMLOCK=)", memlock())
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		f.Exit = config.ExitNoPerm
		f.Hint = "it takes CAP_BPF and CAP_NET_ADMIN (root has both; in a pod, securityContext.capabilities.add), and a seccomp profile that allows bpf(2)"
	case errors.Is(err, unix.ENOSYS):
		f.Hint = "this kernel was built without bpf(2) (CONFIG_BPF_SYSCALL)"
	}
	return f
}

// AskBPF asks bpf(2) for a command that does not exist: EINVAL is the answer of a kernel that lets us in.
func AskBPF() error {
	const noSuchCommand = 0x7fff
	var attr [16]byte
	_, _, errno := unix.Syscall(unix.SYS_BPF, noSuchCommand, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	return errno
}

func hasBPF() bool { return holds(cap.BPF) || holds(cap.SYS_ADMIN) }

// memlock is the limit of locked memory, for people.
func memlock() string {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &l); err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%d KiB", l.Cur>>10)
}

// counterNames are the names of the verdicts in the order of their index, as the object itself has them.
func counterNames() ([]string, error) {
	spec, err := bpf.LoadCapture()
	if err != nil {
		return nil, err
	}
	var enum *btf.Enum
	if err := spec.Types.TypeByName("counter", &enum); err != nil {
		return nil, err
	}
	var names []string
	for _, v := range enum.Values {
		if v.Name != "COUNT_MAX" {
			names = append(names, strings.ToLower(strings.TrimPrefix(v.Name, "COUNT_")))
		}
	}
	return names, nil
}

// readCounters sums each verdict over the CPUs.
func readCounters(m *ebpf.Map) (map[string]uint64, error) {
	names, err := counterNames()
	if err != nil {
		return nil, err
	}
	counts := make(map[string]uint64, len(names))
	for i, name := range names {
		var perCPU []uint64
		if err := m.Lookup(uint32(i), &perCPU); err != nil {
			return nil, fmt.Errorf("read counter %s: %w", name, err)
		}
		for _, n := range perCPU {
			counts[name] += n
		}
	}
	return counts, nil
}
