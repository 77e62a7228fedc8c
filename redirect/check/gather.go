// SPDX-License-Identifier: Apache-2.0

package check

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/pillionproxy/pillion/redirect/ebpf"
	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// Options say what to look at.
type Options struct {
	Cgroup string                             // directory that would be captured; empty: that of this process
	Run    Runner                             // starts programs that only read
	Lab    func(context.Context) (Lab, error) // runs RunLab in another process, inside new namespaces
}

// Gather asks the host. It fails in nothing: what could not be asked is unknown.
func Gather(ctx context.Context, o Options) Facts {
	f := Facts{Capabilities: capabilities(), InnerUser: innerUser(), Seccomp: hasSeccomp()}
	f.Kernel, f.Machine = release()
	f.Cgroup = gatherCgroup(o.Cgroup)
	f.BPF = gatherBPF(f)
	f.Sysctls, f.IPv6 = gatherSysctls(), gatherIPv6()
	f.Network = gatherNetwork()
	lab, err := o.Lab(ctx)
	if err != nil {
		lab.Ran = Answer{State: Unknown, Detail: err.Error()}
	}
	f.Lab = lab
	f.Chains = gatherChains(ctx, o.Run, &f.Lab)
	f.Namespaces = UserNamespaces{
		Max: sysctl("user/max_user_namespaces"), Clone: sysctl("kernel/unprivileged_userns_clone"),
		AppArmor: sysctl("kernel/apparmor_restrict_unprivileged_userns"),
	}
	if !f.Has("CAP_SYS_ADMIN") {
		f.Namespaces.Unprivileged = lab.Ran
	}
	f.Captures = captures()
	return f
}

func release() (kernel, machine string) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", ""
	}
	return unix.ByteSliceToString(u.Release[:]), unix.ByteSliceToString(u.Machine[:])
}

// capabilities are the effective ones, as the kernel's manuals write them.
func capabilities() []string {
	have := cap.GetProc()
	var names []string
	for c := cap.Value(0); c < cap.MaxBits(); c++ {
		if ok, err := have.GetFlag(cap.Effective, c); err == nil && ok {
			names = append(names, strings.ToUpper(c.String()))
		}
	}
	return names
}

// hasSeccomp reports whether a filter may refuse system calls (proc(5)).
func hasSeccomp() bool {
	b, err := os.ReadFile("/proc/thread-self/status")
	return err == nil && strings.Contains(string(b), "\nSeccomp:\t2")
}

// sysctl reads a kernel parameter by its path; empty where there is none.
func sysctl(path string) string {
	b, err := os.ReadFile("/proc/sys/" + path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func captures() []Installed {
	reports, err := ebpf.Inspect()
	if err != nil {
		return nil
	}
	var list []Installed
	for _, r := range reports {
		where := r.Cgroup
		if where == "" && r.CgroupID != 0 {
			where = fmt.Sprintf("cgroup id %d", r.CgroupID)
		}
		list = append(list, Installed{Slot: r.Slot, Backend: r.Backend, Cgroup: where, Effective: r.Effective()})
	}
	return list
}

// missingRight says why the kernel refused to answer.
func missingRight(err error, capability string) string {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return "needs " + capability
	}
	return err.Error()
}
