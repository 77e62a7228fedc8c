// SPDX-License-Identifier: Apache-2.0

package check

import (
	"fmt"
	"slices"
	"strings"
)

func cgroupRows(f Facts) []Row {
	return []Row{hierarchyRow(f.Cgroup), namespaceRow(f.Cgroup), targetRow(f), writableRow(f.Cgroup), heldRow(f.Cgroup)}
}

func hierarchyRow(c Cgroup) Row {
	r := Row{Group: "cgroup", What: "cgroup2", State: OK, Needs: needs(Required, EBPF)}
	var points []string
	for _, m := range c.V2 {
		point := m.Point
		if m.ReadOnly {
			point += " (read-only)"
		}
		points = append(points, point)
	}
	switch {
	case len(c.V2) > 0 && c.V1 > 0:
		r.Detail = fmt.Sprintf("hybrid: version 2 at %s beside %d hierarchies of version 1", list(points), c.V1)
	case len(c.V2) > 0:
		r.Detail = "at " + list(points)
	case c.V1 > 0:
		r.State, r.Detail = Missing, fmt.Sprintf("only %d hierarchies of version 1 are mounted", c.V1)
		r.Hint = "mount it beside them (mount -t cgroup2 none /sys/fs/cgroup/unified), or boot with systemd.unified_cgroup_hierarchy=1"
	default:
		r.State, r.Detail = Missing, "no cgroup file system is mounted"
		r.Hint = "mount the host's cgroup2 file system (in a pod: a hostPath volume of /sys/fs/cgroup)"
	}
	return r
}

func namespaceRow(c Cgroup) Row {
	r := Row{Group: "cgroup", What: "cgroup namespace", State: OK, Detail: c.PrivateNS.Detail}
	if c.PrivateNS.state() == Unknown {
		r.State = Unknown
	}
	if c.Own != "" {
		r.Detail += "; this process is in " + c.Own
	}
	return r
}

// targetRow is whether the cgroup to capture can be found: by its name, or from inside one of the pod's containers
// (redirect/cgroup.FindPod).
func targetRow(f Facts) Row {
	c := f.Cgroup
	r := Row{Group: "cgroup", What: "cgroup to capture", State: OK, Detail: c.Target, Needs: needs(Required, EBPF)}
	switch {
	case c.TargetErr != "":
		r.State, r.Detail, r.Hint = Missing, c.TargetErr, c.TargetHint
	case c.Given:
	case c.PrivateNS.state() != Missing:
		r.Detail = "none was given (--cgroup); the own one is looked at: " + c.Target
	case slices.ContainsFunc(c.V2, func(m Mount) bool { return strings.HasPrefix(m.Root, "/..") }):
		r.Detail = "the pod's, by the host's hierarchy that is mounted here"
	case f.Has("CAP_DAC_READ_SEARCH"):
		r.Detail = "the pod's, told by the kernel (CAP_DAC_READ_SEARCH)"
	default:
		r.State, r.Detail = Missing, "the pod's cgroup cannot be seen from inside this container"
		r.Hint = "mount the host's cgroup2 (in a pod: a hostPath volume of /sys/fs/cgroup), or add CAP_DAC_READ_SEARCH"
	}
	return r
}

func writableRow(c Cgroup) Row {
	r := Row{Group: "cgroup", What: "writable cgroup", State: c.Writable.state(), Detail: c.Writable.Detail, Needs: needs(Better, EBPF)}
	r.Lost = "no proof from outside of the cgroup (init --no-verify goes without), and no `pillion run`"
	r.Hint = "mount cgroup2 writable, or run it as root"
	if c.Target == "" {
		r.State, r.Detail = Unknown, "no cgroup to look at"
	}
	return r
}

func heldRow(c Cgroup) Row {
	r := Row{Group: "cgroup", What: "others' programs", State: OK, Detail: "none that would keep ours off", Needs: needs(Required, EBPF)}
	switch {
	case c.HeldErr != "" || c.Target == "":
		r.State, r.Detail, r.Needs = Unknown, c.HeldErr, needs(Better, EBPF)
		if c.Target == "" {
			r.Detail = "no cgroup to look at"
		}
		return r
	case len(c.Held) == 0:
		return r
	}
	var exclusive, replaced []string
	for _, h := range c.Held {
		if text := h.Attach + " of " + h.Cgroup; h.Exclusive {
			exclusive = append(exclusive, text)
		} else {
			replaced = append(replaced, text)
		}
	}
	r.State = Conflict
	if len(exclusive) > 0 {
		r.Detail = "a program is attached exclusively: " + list(exclusive)
		r.Hint = "its owner must attach it with BPF_F_ALLOW_MULTI or by a bpf_link (bpftool cgroup tree shows it)"
		return r
	}
	r.Needs, r.Detail = needs(Better, EBPF), "attached with BPF_F_ALLOW_OVERRIDE: "+list(replaced)
	r.Lost = "those programs no longer run for what is captured"
	r.Hint = "its owner should attach it with BPF_F_ALLOW_MULTI"
	return r
}

func bpfRows(f Facts) []Row {
	b := f.BPF
	syscall := Row{Group: "bpf", What: "bpf(2)", State: b.Syscall.state(), Detail: b.Syscall.Detail, Needs: needs(Required, EBPF)}
	syscall.Hint = "use a seccomp profile that allows bpf(2) (RuntimeDefault does so with CAP_BPF), or a kernel with CONFIG_BPF_SYSCALL"
	if syscall.State == Unknown {
		syscall.Hint = "run it as root, or give it CAP_BPF"
	}
	if f.Seccomp && syscall.State == OK {
		syscall.Detail = "allowed by the seccomp filter"
	}
	btf := Row{Group: "bpf", What: "BTF", State: b.BTF.state(), Detail: b.BTF.Detail, Needs: needs(Better, EBPF), Lost: lostFastForm}
	btf.Hint = "a kernel with CONFIG_DEBUG_INFO_BTF"
	clsact := Row{Group: "bpf", What: "clsact", State: f.Lab.Clsact.state(), Detail: f.Lab.Clsact.Detail, Needs: needs(Required, EBPF)}
	clsact.Hint = "load the module sch_ingress"
	if clsact.State == Unknown { // nothing hints at its absence: every distribution has it
		clsact.Needs, clsact.Hint = needs(Better, EBPF), "init will see; to try it here takes CAP_SYS_ADMIN or a user namespace"
		if clsact.Detail == "" {
			clsact.Detail = f.Lab.Ran.Detail
		}
	}
	tcx := Row{Group: "bpf", What: "tcx", State: b.TCX.state(), Detail: b.TCX.Detail}
	if tcx.State == Missing {
		tcx.Detail += "; clsact serves"
	}
	return append([]Row{syscall, programsRow(b), loadRow(b), btf, clsact, tcx}, settingRows(f)...)
}

const lostFastForm = "a SYN that meets a TIME_WAIT waits for 2 jiffies"

func programsRow(b BPF) Row {
	r := Row{Group: "bpf", What: "types and helpers", State: OK, Needs: needs(Required, EBPF), Hint: "Linux 5.10 or newer"}
	var missing, unknown []string
	why := ""
	for _, p := range b.Programs {
		switch p.Answer.state() {
		case Missing:
			missing = append(missing, p.Name)
		case Unknown:
			unknown, why = append(unknown, p.Name), p.Answer.Detail
		}
	}
	switch {
	case len(missing) > 0:
		r.State, r.Detail = Missing, "the kernel lacks "+list(missing)
	case len(unknown) > 0:
		r.State, r.Detail, r.Hint = Unknown, why, "run it as root, or give it CAP_BPF and CAP_NET_ADMIN"
		r.Needs = needs(Better, EBPF) // whether the object loads decides
	case len(b.Programs) == 0:
		r.State, r.Detail = Unknown, "not asked for"
	default:
		r.Detail = fmt.Sprintf("%d program types, helpers and map types, asked for one by one: all there", len(b.Programs))
	}
	return r
}

func loadRow(b BPF) Row {
	r := Row{Group: "bpf", What: "capture loads", State: b.Load.state(), Detail: b.Load.Detail, Needs: needs(Required, EBPF)}
	r.Hint = "Linux 5.10 or newer; the rows around this one say what is wrong"
	if r.State == Unknown {
		r.Hint = "run it as root, or give it CAP_BPF and CAP_NET_ADMIN"
	}
	return r
}

func settingRows(f Facts) []Row {
	said := func(what, value, meaning string) Row {
		r := Row{Group: "bpf", What: what, State: OK, Detail: value + meaning}
		if value == "" {
			r.State, r.Detail = Unknown, "cannot be read here"
		}
		return r
	}
	rows := []Row{
		said("unprivileged_bpf_disabled", f.BPF.Unprivileged, map[string]string{"0": ": users may load some programs", "1": ": only CAP_BPF may", "2": ": only CAP_BPF may"}[f.BPF.Unprivileged]),
		said("lockdown", f.BPF.Lockdown, map[string]string{"confidentiality": ": programs may not read kernel memory, which the capture does not"}[f.BPF.Lockdown]),
	}
	if !before(f.Kernel, 5, 11) {
		return rows
	}
	memlock := Row{Group: "bpf", What: "RLIMIT_MEMLOCK", State: OK, Detail: fmt.Sprintf("%d KiB", f.BPF.MemlockKiB), Needs: needs(Better, EBPF)}
	switch {
	case f.BPF.MemlockKiB == ^uint64(0):
		memlock.Detail = "no limit"
	case f.BPF.MemlockKiB < 2048 && !f.Has("CAP_SYS_RESOURCE"):
		memlock.State, memlock.Detail = Missing, memlock.Detail+", which all BPF of this user id shares before Linux 5.11"
		memlock.Lost = "loading may fail with EPERM"
		memlock.Hint = "add CAP_SYS_RESOURCE, or raise the limit to some MiB (ulimit -l, LimitMEMLOCK=)"
	}
	return append(rows, memlock)
}

// rights are the capabilities that anything here asks for.
var rights = []struct {
	name, purpose, lost string
	needs               map[Backend]Need
}{
	{"CAP_BPF", "load programs", "", needs(Required, EBPF)},
	{"CAP_NET_ADMIN", "attach programs and set rules, routes and packet filters", "", needs(Required, EBPF, TProxy, Redirect)},
	{"CAP_PERFMON", "load programs that read kernel memory", lostFastForm, needs(Better, EBPF)},
	{"CAP_SYS_ADMIN", "detach what another process attached, and read its counters", "`clean` and another policy are refused, and `status` has no counters", needs(Better, EBPF)},
	{"CAP_SYS_PTRACE", "take over listeners that are open already", "init refuses apps that listen already (or leaves them: --ignore-open-listeners)", needs(Better, EBPF)},
	{"CAP_SETUID", "try the proxy's user", "`verify` does not try the proxy's user", needs(Better, EBPF, TProxy, Redirect)},
	{"CAP_DAC_READ_SEARCH", "open the pod's cgroup by its id, where no --cgroup is given", "", nil},
	{"CAP_SYS_RESOURCE", "lift the limit of locked memory, before Linux 5.11", "", nil},
	{"CAP_NET_RAW", "use iptables-legacy; the proxy of ebpf and tproxy wants it to dial in a client's name", "iptables-legacy cannot be used", needs(Better, TProxy, Redirect)},
}

func capabilityRows(f Facts) []Row {
	var rows []Row
	for _, c := range rights {
		if c.name == "CAP_SYS_RESOURCE" && !before(f.Kernel, 5, 11) {
			continue
		}
		r := Row{Group: "capabilities", What: c.name, State: OK, Detail: "to " + c.purpose, Lost: c.lost, Needs: c.needs}
		if !f.Has(c.name) {
			r.State, r.Detail = Missing, "not held; it is to "+c.purpose
			if f.InnerUser {
				r.Detail = "would not count in this user namespace, which is not the machine's; it is to " + c.purpose
			}
			if c.lost == "" && len(c.needs) > 0 {
				r.Hint = "run it as root, or add it (in a pod: securityContext.capabilities.add)"
			}
		}
		rows = append(rows, r)
	}
	return rows
}
