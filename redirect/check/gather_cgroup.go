// SPDX-License-Identifier: Apache-2.0

package check

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect/cgroup"
	"golang.org/x/sys/unix"
)

func gatherCgroup(path string) Cgroup {
	var c Cgroup
	if b, err := os.ReadFile("/proc/thread-self/mountinfo"); err == nil {
		c.V2, c.V1 = cgroupMounts(string(b))
	}
	c.Own, _ = cgroup.Own()
	c.PrivateNS = cgroupNamespace()
	dir, err := cgroup.OwnDir()
	if c.Given = path != ""; c.Given {
		dir, err = cgroup.Open(path)
	}
	if err != nil {
		c.TargetErr, c.TargetHint = err.Error(), config.HintOf(err)
		return c
	}
	defer dir.Close()
	c.Target = dir.Path
	c.Writable = writableDir(dir.Path)
	c.Held, c.HeldErr = heldHooks(dir.Path, c.V2)
	return c
}

// cgroupMounts reads /proc/self/mountinfo (proc_pid_mountinfo(5)).
func cgroupMounts(mountinfo string) (v2 []Mount, v1 int) {
	for line := range strings.Lines(mountinfo) {
		left, right, ok := strings.Cut(line, " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 6 || len(r) < 3 {
			continue
		}
		switch r[0] {
		case "cgroup":
			v1++
		case "cgroup2":
			v2 = append(v2, Mount{Point: l[4], Root: l[3], ReadOnly: hasOption(l[5], "ro") || hasOption(r[2], "ro")})
		}
	}
	return v2, v1
}

func hasOption(options, want string) bool {
	for o := range strings.SplitSeq(options, ",") {
		if o == want {
			return true
		}
	}
	return false
}

// initialCgroupNS is the inode number of the machine's own cgroup namespace (PROC_CGROUP_INIT_INO in linux/proc_ns.h).
const initialCgroupNS = "cgroup:[4026531835]"

func cgroupNamespace() Answer {
	ns, err := os.Readlink("/proc/self/ns/cgroup")
	switch {
	case err != nil:
		return Answer{State: Unknown, Detail: err.Error()}
	case ns == initialCgroupNS:
		return Answer{State: OK, Detail: "the host's"}
	default:
		return Answer{State: Missing, Detail: "private: cgroups above this container cannot be named"}
	}
}

func writableDir(path string) Answer {
	err := unix.Faccessat(unix.AT_FDCWD, path, unix.W_OK, unix.AT_EACCESS)
	switch {
	case err == nil:
		return Answer{State: OK, Detail: "yes"}
	case errors.Is(err, unix.EROFS):
		return Answer{State: Missing, Detail: "no: it is mounted read-only"}
	default:
		return Answer{State: Missing, Detail: err.Error()}
	}
}

// hookTypes are the hooks of the capture (redirect/ebpf), by the kernel's name.
var hookTypes = []struct {
	name   string
	attach ebpf.AttachType
}{
	{"sock_create", ebpf.AttachCGroupInetSockCreate},
	{"post_bind4", ebpf.AttachCGroupInet4PostBind},
	{"post_bind6", ebpf.AttachCGroupInet6PostBind},
	{"connect4", ebpf.AttachCGroupInet4Connect},
	{"connect6", ebpf.AttachCGroupInet6Connect},
	{"sock_ops", ebpf.AttachCGroupSockOps},
}

// heldHooks walks up from a cgroup as the kernel does when it is asked to attach (hierarchy_allows_attach in
// kernel/bpf/cgroup.c): the nearest cgroup with a program on that hook decides.
func heldHooks(path string, mounts []Mount) (held []HeldHook, unknown string) {
	for _, h := range hookTypes {
		for dir := path; ; dir = filepath.Dir(dir) {
			count, flags, err := queryHook(dir, h.attach)
			if err != nil {
				return held, missingRight(err, "CAP_NET_ADMIN")
			}
			if flags&unix.BPF_F_ALLOW_MULTI != 0 {
				break
			}
			if count > 0 {
				exclusive := flags&unix.BPF_F_ALLOW_OVERRIDE == 0 || dir == path // beside another, all must be ALLOW_MULTI
				held = append(held, HeldHook{Cgroup: dir, Attach: h.name, Exclusive: exclusive})
				break
			}
			if isMountPoint(dir, mounts) || dir == "/" || dir == "." {
				break
			}
		}
	}
	return held, ""
}

func isMountPoint(dir string, mounts []Mount) bool {
	for _, m := range mounts {
		if m.Point == dir {
			return true
		}
	}
	return false
}

// progQuery is the part of union bpf_attr that BPF_PROG_QUERY reads and writes (linux/bpf.h). cilium/ebpf does not give
// attach_flags.
type progQuery struct {
	target, attach, queryFlags, attachFlags uint32
	ids                                     uint64
	count, _                                uint32
}

// queryHook is how many programs a cgroup itself has on a hook, and with which flags they were attached.
func queryHook(path string, attach ebpf.AttachType) (count, flags uint32, err error) {
	dir, err := os.Open(path)
	if err != nil {
		return 0, 0, err
	}
	defer dir.Close()
	q := progQuery{target: uint32(dir.Fd()), attach: uint32(attach)}
	_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_QUERY, uintptr(unsafe.Pointer(&q)), unsafe.Sizeof(q))
	if errno == unix.EINVAL {
		return 0, 0, nil // the kernel does not have the hook: the programs' row says so
	}
	if errno != 0 {
		return 0, 0, errno
	}
	return q.count, q.attachFlags, nil
}
