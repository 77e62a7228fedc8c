// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"github.com/pillionproxy/pillion/bpf"
	"github.com/pillionproxy/pillion/config"
	"golang.org/x/sys/unix"
)

// toldByKernel is where our own cgroup is in the whole hierarchy: the kernel tells the ids of the cgroups above, and each
// of those, opened by its id, has the name of the next.
func toldByKernel(self *Dir) (place, error) {
	ids, err := ancestry(self)
	if err != nil {
		return place{}, err
	}
	depth := slices.Index(ids, self.ID)
	if depth < 0 {
		return place{}, fmt.Errorf("the own cgroup %d is not among the %d that the kernel told: it lies too deep", self.ID, len(ids))
	}
	path := ""
	for level := range depth {
		name, err := childName(self, ids[level], ids[level+1])
		if err != nil {
			return place{}, err
		}
		path += "/" + name
	}
	open := func(above string) (*Dir, error) { return openByID(self, ids[strings.Count(above, "/")], above) }
	return place{path, true, open, "ids of the cgroups above, told by the kernel"}, nil
}

// ancestry is the ids of the cgroups from the root to this process's, if it is not too deep.
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

// childName is the name of a cgroup in the one above it.
func childName(mount *Dir, parent, child uint64) (string, error) {
	dir, err := openByID(mount, parent, fmt.Sprintf("cgroup id %d", parent))
	if err != nil {
		return "", err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return "", fmt.Errorf("read cgroup %d: %w", parent, err)
	}
	for _, name := range names {
		var st unix.Stat_t
		err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err == nil && st.Ino == child {
			return name, nil
		}
	}
	return "", fmt.Errorf("cgroup %d is not in cgroup %d", child, parent)
}

// fileidKernfs is the type of a kernfs file handle, whose body is the 64-bit inode number (include/linux/exportfs.h).
const fileidKernfs = 0xfe

// openByID opens a cgroup of the hierarchy of another, and calls it by a name.
func openByID(mount *Dir, id uint64, name string) (*Dir, error) {
	handle := unix.NewFileHandle(fileidKernfs, binary.NativeEndian.AppendUint64(nil, id))
	fd, err := unix.OpenByHandleAt(int(mount.Fd()), handle, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS) {
		return nil, &config.Fault{
			Err:  fmt.Errorf("open cgroup %d by its id, which takes CAP_DAC_READ_SEARCH: %w", id, err),
			Hint: "cgroups above the container take CAP_DAC_READ_SEARCH and a seccomp profile that allows open_by_handle_at(2): give both, or " + hostDir,
			Exit: config.ExitNoPerm,
		}
	}
	if err != nil {
		return nil, fmt.Errorf("open cgroup %d by its id: %w", id, err)
	}
	return fromFile(os.NewFile(uintptr(fd), name), name)
}
