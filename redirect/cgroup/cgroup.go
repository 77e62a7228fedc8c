// SPDX-License-Identifier: Apache-2.0

// Package cgroup finds cgroup2 directories: the one that a user names, the one that this process is in, and the pod's
// from inside one of its containers.
//
// What always holds: a Dir is an open directory of a cgroup2 file system, and its ID is what the kernel and BPF call the
// cgroup's id. Nothing here changes a cgroup, but for FindPod, which attaches a program to its own for one connect(2).
package cgroup

import (
	"errors"
	"fmt"
	"os"
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

// Open opens a cgroup2 directory that a user names by its path. Its errors are faults with a hint.
func Open(path string) (*Dir, error) {
	d, err := open(path)
	if err == nil {
		return d, nil
	}
	hint := "name a directory of the cgroup2 file system"
	if errors.Is(err, errVersion1) {
		hint = "BPF cannot capture it: " + hint
	}
	if m, merr := Mounts(); merr == nil && len(m) > 0 {
		hint += ", which is mounted at " + m[0].Point
	}
	return nil, &config.Fault{Err: fmt.Errorf("--cgroup: %w", err), Hint: hint, Exit: config.ExitConfig}
}

func open(path string) (*Dir, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	return fromFile(f, path)
}

var (
	errNotCgroup2 = errors.New("not a cgroup2 directory")
	errVersion1   = fmt.Errorf("%w, but one of version 1", errNotCgroup2)
)

// fromFile takes the file over: it closes it if it is no cgroup2 directory.
func fromFile(f *os.File, path string) (*Dir, error) {
	id, err := idOf(f)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return &Dir{File: f, Path: path, ID: id}, nil
}

func idOf(f *os.File) (uint64, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return 0, err
	}
	switch st.Type {
	case unix.CGROUP2_SUPER_MAGIC:
	case unix.CGROUP_SUPER_MAGIC:
		return 0, errVersion1
	default:
		return 0, errNotCgroup2
	}
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Sys().(*syscall.Stat_t).Ino, nil
}

// Own is the path of this process's cgroup as /proc/self/cgroup names it, "/" at the root of its cgroup namespace. It begins
// with "/.." where the process is outside of what its namespace shows.
func Own() (string, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			return strings.TrimSuffix(path, "\n"), nil
		}
	}
	return "", errNoCgroup2
}

// The line 0:: is there as soon as cgroup2 was mounted once since the node has booted.
var errNoCgroup2 = errors.New("this node has no cgroup2 hierarchy")

// OwnDir opens this process's cgroup.
func OwnDir() (*Dir, error) {
	d, err := ownDir()
	if err != nil {
		return nil, seen(err)
	}
	return d, nil
}

func ownDir() (*Dir, error) {
	own, err := Own()
	if err != nil {
		return nil, err
	}
	mounts, err := Mounts()
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		if path, ok := m.path(own); ok {
			if d, err := open(path); err == nil {
				return d, nil
			}
		}
	}
	// A hierarchy that shows more than our cgroup namespace names none of what lies above; but no other cgroup has a
	// process with our number, for each reader sees the numbers of its own PID namespace.
	for _, m := range mounts {
		if path := m.find(hasProcess(os.Getpid())); path != "" {
			if d, err := open(path); err == nil {
				return d, nil
			}
		}
	}
	d, err := openUnmounted(own)
	if err != nil {
		return nil, fmt.Errorf("own cgroup %s is under no cgroup2 mount: %w", own, err)
	}
	return d, nil
}

// openUnmounted opens a cgroup by its path in our cgroup namespace through a mount of our own that is attached nowhere, and
// goes when the file is closed: a container on a host of both versions sees version 1 alone. It takes CAP_SYS_ADMIN.
func openUnmounted(path string) (*Dir, error) {
	if strings.HasPrefix(path, "/..") {
		return nil, fmt.Errorf("cgroup %s is outside of our cgroup namespace", path)
	}
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
	return fromFile(os.NewFile(uintptr(fd), path), path)
}
