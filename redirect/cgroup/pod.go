// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"github.com/pillionproxy/pillion/bpf"
	"github.com/pillionproxy/pillion/config"
	"golang.org/x/sys/unix"
)

// FindPod opens the cgroup of the pod that this container is part of, and says how it was found. The ways are tried in
// this order:
//
//  1. the path in /proc/self/cgroup, where the host's cgroup namespace is ours (containerd and CRI-O give it to
//     privileged containers);
//  2. the host's hierarchy mounted somewhere: the directory with the inode number of our own cgroup;
//  3. the kernel: a program attached to our own cgroup reads the ids of the cgroups above it, and the pod's is opened by
//     its id. It needs CAP_DAC_READ_SEARCH and a seccomp profile that allows open_by_handle_at(2).
//
// Its errors are faults that say what was seen and what to mount.
func FindPod() (dir *Dir, how string, err error) {
	own, err := Own()
	if err != nil {
		return nil, "", seen(err)
	}
	if own != "/" && !strings.HasPrefix(own, "/..") {
		d, err := podAbovePath(own)
		return d, "own cgroup namespace path " + own, err
	}
	self, err := OwnDir()
	if err != nil {
		return nil, "", err
	}
	defer self.Close()
	if self.ID == rootID {
		return nil, "", seen(errors.New("this process is in the root cgroup: no pod is above it"))
	}
	if path := containerPath(self); path != "" {
		d, err := podAbovePath(path)
		return d, "inode of the own cgroup under a mounted host hierarchy", err
	}
	d, err := podByAncestry(self)
	if err != nil {
		return nil, "", seen(fmt.Errorf("the cgroup above this container cannot be found: no host hierarchy is mounted, and the kernel did not tell: %w", err))
	}
	return d, "ids of the cgroups above, told by the kernel", nil
}

// rootID is the inode number of the root of a cgroup2 hierarchy.
const rootID = 1

// podDir matches the pod's directory with both drivers: pod<uid>, kubepods-burstable-pod<uid>.slice, and podman's.
var podDir = regexp.MustCompile(`(^|-)pod[0-9a-f]{8}[-_]|^libpod_pod_|^pod[0-9a-f]{32,}`)

// podAbove is the pod's directory above a container's: by its name, else the parent. "" at the top.
func podAbove(container string) string {
	for p := container; p != "/" && p != "."; p = filepath.Dir(p) {
		if podDir.MatchString(filepath.Base(p)) {
			return p
		}
	}
	if parent := filepath.Dir(container); parent != "/" {
		return parent
	}
	return ""
}

// podAbovePath opens the pod above a container, whose path is either absolute under a mount, or one of /proc/self/cgroup.
func podAbovePath(container string) (*Dir, error) {
	mounts, err := Mounts()
	if err != nil {
		return nil, err
	}
	pod := podAbove(container)
	if pod == "" {
		return nil, seen(fmt.Errorf("cgroup %s has no pod above it", container))
	}
	for _, m := range mounts {
		path := pod
		if !strings.HasPrefix(container, m.Point+"/") {
			rel, err := filepath.Rel(m.Root, pod)
			if err != nil || strings.HasPrefix(rel, "..") {
				continue
			}
			path = filepath.Join(m.Point, rel)
		}
		if path == m.Point {
			continue
		}
		if d, err := Open(path); err == nil {
			return d, nil
		}
	}
	if d, err := openUnmounted(pod); err == nil {
		return d, nil
	}
	return nil, seen(fmt.Errorf("the pod's cgroup %s is under no mount", pod))
}

// containerPath finds our own cgroup in a hierarchy that shows more than our own cgroup namespace.
func containerPath(self *Dir) string {
	mounts, err := Mounts()
	if err != nil {
		return ""
	}
	for _, m := range mounts {
		if m.Point == self.Path {
			continue
		}
		if path := find(m.Point, self.ID); path != "" && path != m.Point {
			return path
		}
	}
	return ""
}

// podByAncestry asks the kernel for the cgroup ids above this process and opens the parent by its id.
func podByAncestry(self *Dir) (*Dir, error) {
	ids, err := ancestry(self)
	if err != nil {
		return nil, err
	}
	parent := uint64(0)
	for i, id := range ids {
		if id == self.ID && i > 1 { // level 0 is the root, which is nobody's pod
			parent = ids[i-1]
		}
	}
	if parent == 0 {
		return nil, fmt.Errorf("no cgroup between the root and this container (ids %v)", ids)
	}
	return openByID(self, parent)
}

// ancestry is the ids of the cgroups from the root to this process's.
func ancestry(self *Dir) ([]uint64, error) {
	spec, err := bpf.LoadProbe()
	if err != nil {
		return nil, err
	}
	var objects struct {
		Program *ebpf.Program `ebpf:"pln_ancestry"`
		Levels  *ebpf.Map     `ebpf:"ancestors"`
	}
	_ = rlimit.RemoveMemlock() // see redirect/ebpf: before Linux 5.11 BPF counts against it
	if err := spec.LoadAndAssign(&objects, nil); err != nil {
		return nil, fmt.Errorf("load pln_ancestry: %w", err)
	}
	defer objects.Program.Close()
	defer objects.Levels.Close()
	at := link.RawAttachProgramOptions{Target: int(self.Fd()), Program: objects.Program, Attach: ebpf.AttachCGroupInet4Connect, Flags: unix.BPF_F_ALLOW_MULTI}
	if err := link.RawAttachProgram(at); err != nil {
		return nil, fmt.Errorf("attach pln_ancestry to the own cgroup: %w", err)
	}
	defer link.RawDetachProgram(link.RawDetachProgramOptions{Target: at.Target, Program: at.Program, Attach: at.Attach})
	// The program runs before anything is sent, and nothing needs to listen.
	if c, err := net.DialTCP("tcp4", nil, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9}); err == nil {
		c.Close()
	}
	var ids []uint64
	for i := range objects.Levels.MaxEntries() {
		var id uint64
		if err := objects.Levels.Lookup(i, &id); err != nil {
			return nil, fmt.Errorf("read the cgroup ids: %w", err)
		}
		if id != 0 {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// fileidKernfs is the type of a kernfs file handle, whose body is the 64-bit inode number (include/linux/exportfs.h).
const fileidKernfs = 0xfe

func openByID(mount *Dir, id uint64) (*Dir, error) {
	handle := unix.NewFileHandle(fileidKernfs, binary.NativeEndian.AppendUint64(nil, id))
	fd, err := unix.OpenByHandleAt(int(mount.Fd()), handle, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC)
	if errors.Is(err, unix.EPERM) {
		return nil, &config.Fault{
			Err:  fmt.Errorf("open cgroup %d by its id: %w", id, err),
			Hint: "it takes CAP_DAC_READ_SEARCH and a seccomp profile that allows open_by_handle_at(2); or mount the host's cgroup2",
			Exit: config.ExitNoPerm,
		}
	}
	if err != nil {
		return nil, fmt.Errorf("open cgroup %d by its id: %w", id, err)
	}
	name := fmt.Sprintf("cgroup id %d", id)
	d, err := fromFile(os.NewFile(uintptr(fd), name), name)
	if err != nil {
		unix.Close(fd)
	}
	return d, err
}
