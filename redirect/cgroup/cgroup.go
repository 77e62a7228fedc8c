// SPDX-License-Identifier: Apache-2.0

// Package cgroup finds cgroup2 directories: the one that a user names, the one that this process is in, and the pod's
// from inside one of its containers.
//
// What always holds: a Dir is an open directory of a cgroup2 file system, and its ID is what the kernel and BPF call the
// cgroup's id. Nothing here changes a cgroup, but for FindPod, which attaches a program to its own for one connect(2).
package cgroup

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/pillionproxy/pillion/config"
	"golang.org/x/sys/unix"
)

// Dir is an open cgroup2 directory. Its owner closes it.
type Dir struct {
	*os.File
	Path string // as it was found; may be unreachable by that name when it was opened by id
	ID   uint64
}

// Open opens a cgroup2 directory by its path. Its errors are faults with a hint.
func Open(path string) (*Dir, error) {
	f, err := os.Open(path)
	if err != nil {
		hint := "name a directory of the cgroup2 file system"
		if m, merr := Mounts(); merr == nil && len(m) > 0 {
			hint += ", which is mounted at " + m[0].Point
		}
		return nil, &config.Fault{Err: fmt.Errorf("--cgroup: %w", err), Hint: hint, Exit: config.ExitConfig}
	}
	d, err := fromFile(f, path)
	if err != nil {
		f.Close()
		return nil, err
	}
	return d, nil
}

func fromFile(f *os.File, path string) (*Dir, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return nil, fmt.Errorf("--cgroup %s: %w", path, err)
	}
	if st.Type != unix.CGROUP2_SUPER_MAGIC {
		hint := "name a directory of the cgroup2 file system"
		if st.Type == unix.CGROUP_SUPER_MAGIC {
			hint = "this is a version 1 hierarchy, which BPF cannot capture"
		}
		if m, err := Mounts(); err == nil && len(m) > 0 {
			hint += "; cgroup2 is mounted at " + m[0].Point
		}
		return nil, &config.Fault{Err: fmt.Errorf("--cgroup %s: not a cgroup2 directory", path), Hint: hint, Exit: config.ExitConfig}
	}
	id, err := idOf(f)
	if err != nil {
		return nil, fmt.Errorf("--cgroup %s: %w", path, err)
	}
	return &Dir{File: f, Path: path, ID: id}, nil
}

func idOf(f *os.File) (uint64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Sys().(*syscall.Stat_t).Ino, nil
}

// Mount is a mounted cgroup2 file system.
type Mount struct {
	Point string // where
	Root  string // which cgroup is there, as this process's cgroup namespace names it
}

// Mounts lists the cgroup2 file systems that this process sees, in order of mounting.
func Mounts() ([]Mount, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var mounts []Mount
	for lines := bufio.NewScanner(f); lines.Scan(); {
		// 36 35 98:0 /root /point rw,noatime master:1 - cgroup2 cgroup2 rw  (proc_pid_mountinfo(5))
		left, right, ok := strings.Cut(lines.Text(), " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if ok && len(l) >= 5 && len(r) >= 1 && r[0] == "cgroup2" {
			mounts = append(mounts, Mount{Point: unescape(l[4]), Root: unescape(l[3])})
		}
	}
	return mounts, nil
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// Own is the path of this process's cgroup as /proc/self/cgroup names it, "/" at the root of its cgroup namespace.
func Own() (string, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	for _, line := range strings.Split(string(b), "\n") {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			return path, nil
		}
	}
	return "", errNoCgroup2
}

var errNoCgroup2 = errors.New("this kernel has no cgroup2 hierarchy")

// OwnDir opens this process's cgroup.
func OwnDir() (*Dir, error) {
	own, err := Own()
	if err != nil {
		return nil, seen(err)
	}
	mounts, err := Mounts()
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		rel, err := filepath.Rel(m.Root, own)
		if err != nil || strings.HasPrefix(rel, "..") {
			continue
		}
		if d, err := Open(filepath.Join(m.Point, rel)); err == nil {
			return d, nil
		}
	}
	if d, err := openUnmounted(own); err == nil {
		return d, nil
	}
	return nil, seen(fmt.Errorf("own cgroup %s is under no cgroup2 mount", own))
}

// openUnmounted opens a cgroup by its path in our cgroup namespace through a mount of our own that is attached nowhere, and
// goes when the file is closed: a container on a host of both versions sees version 1 alone. It takes CAP_SYS_ADMIN.
func openUnmounted(path string) (*Dir, error) {
	fsfd, err := unix.Fsopen("cgroup2", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsopen cgroup2: %w", err)
	}
	defer unix.Close(fsfd)
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return nil, fmt.Errorf("fsconfig cgroup2: %w", err)
	}
	root, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("fsmount cgroup2: %w", err)
	}
	defer unix.Close(root)
	fd, err := unix.Openat(root, "."+path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open cgroup %s: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	d, err := fromFile(f, path)
	if err != nil {
		f.Close()
	}
	return d, err
}

// seen adds to a failed search what there was to see, and what to mount.
func seen(err error) error {
	var v1, v2 []string
	if b, rerr := os.ReadFile("/proc/self/mountinfo"); rerr == nil {
		for _, line := range strings.Split(string(b), "\n") {
			left, right, _ := strings.Cut(line, " - ")
			if l := strings.Fields(left); len(l) >= 5 {
				switch {
				case strings.HasPrefix(right, "cgroup2 "):
					v2 = append(v2, l[4])
				case strings.HasPrefix(right, "cgroup "):
					v1 = append(v1, l[4])
				}
			}
		}
	}
	own, oerr := Own()
	if oerr != nil {
		own = "none"
	}
	var hint string
	switch {
	case len(v2) == 0 && len(v1) > 0:
		hint = "only version 1 cgroups are mounted; boot with systemd.unified_cgroup_hierarchy=1, or mount cgroup2"
	case len(v2) == 0:
		hint = "mount the host's cgroup2 file system (in a pod: a hostPath volume of /sys/fs/cgroup)"
	default:
		hint = "give the directory with --cgroup, or mount the host's cgroup2 file system (in a pod: a hostPath volume of /sys/fs/cgroup)"
	}
	return &config.Fault{
		Err:  fmt.Errorf("%w (cgroup2 mounts: %s; version 1 mounts: %d; own cgroup: %s)", err, list(v2), len(v1), own),
		Hint: hint,
		Exit: config.ExitUnavailable,
	}
}

func list(s []string) string {
	if len(s) == 0 {
		return "none"
	}
	return strings.Join(s, ", ")
}

// PathOf finds the directory of a cgroup id among everything that is mounted, or "" where there is none.
func PathOf(id uint64) string {
	mounts, err := Mounts()
	if err != nil {
		return ""
	}
	for _, m := range mounts {
		if path := find(m.Point, id); path != "" {
			return path
		}
	}
	return ""
}

// find walks a hierarchy for the directory with an inode number. What vanishes meanwhile is passed over.
func find(root string, id uint64) (path string) {
	filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil
		}
		if info, err := d.Info(); err == nil && info.Sys().(*syscall.Stat_t).Ino == id {
			path = p
			return fs.SkipAll
		}
		return nil
	})
	return path
}
