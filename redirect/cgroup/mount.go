// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Mount is a mounted cgroup2 file system.
type Mount struct {
	Point string // where
	// Root is which cgroup is there, as this process's cgroup namespace names it: what lies above the namespace is /.. and
	// so on, without names.
	Root string
}

// Mounts lists the cgroup2 file systems that this process can reach, in order of mounting.
func Mounts() ([]Mount, error) {
	v2, _, err := readMounts()
	return v2, err
}

// readMounts lists the mounts of both versions. One that another was mounted over is not in it: its path leads to the other.
func readMounts() (v2, v1 []Mount, err error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, nil, err
	}
	for line := range strings.Lines(string(b)) {
		// 36 35 98:0 /root /point rw,noatime master:1 - cgroup2 cgroup2 rw  (proc_pid_mountinfo(5))
		left, right, ok := strings.Cut(line, " - ")
		l, kind := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 5 || len(kind) < 1 || kind[0] != "cgroup" && kind[0] != "cgroup2" {
			continue
		}
		m := Mount{Point: unescape(l[4]), Root: unescape(l[3])}
		if id, err := mountID(m.Point); err != nil || id != l[0] {
			continue
		}
		if kind[0] == "cgroup2" {
			v2 = append(v2, m)
		} else {
			v1 = append(v1, m)
		}
	}
	return v2, v1, nil
}

// mountID is the number of the mount that a path leads to, as in mountinfo.
func mountID(path string) (string, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if id, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			return strings.TrimSpace(id), nil
		}
	}
	return "", fmt.Errorf("no mnt_id in fdinfo of %s", path)
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// path is where the cgroup of that name is under the mount; false if it is not, or nobody can tell: /.. has no name.
func (m Mount) path(name string) (string, bool) {
	root := strings.TrimSuffix(m.Root, "/")
	rest, ok := strings.CutPrefix(name, root)
	if !ok || rest != "" && rest[0] != '/' || slices.Contains(strings.Split(rest, "/"), "..") {
		return "", false
	}
	return filepath.Join(m.Point, rest), true
}

// find walks the mounted hierarchy for the first directory that is wanted; "" if none is. What vanishes meanwhile is passed
// over.
func (m Mount) find(wanted func(path string, d fs.DirEntry) bool) (path string) {
	filepath.WalkDir(m.Point, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && wanted(p, d) {
			path = p
			return fs.SkipAll
		}
		return nil
	})
	return path
}

func hasID(id uint64) func(string, fs.DirEntry) bool {
	return func(_ string, d fs.DirEntry) bool {
		info, err := d.Info()
		return err == nil && info.Sys().(*syscall.Stat_t).Ino == id
	}
}

func hasProcess(pid int) func(string, fs.DirEntry) bool {
	return func(path string, _ fs.DirEntry) bool {
		b, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		return err == nil && slices.Contains(strings.Fields(string(b)), strconv.Itoa(pid))
	}
}

// PathOf finds the directory of a cgroup id among everything that is mounted, or "" where there is none.
func PathOf(id uint64) string {
	mounts, err := Mounts()
	if err != nil {
		return ""
	}
	for _, m := range mounts {
		if path := m.find(hasID(id)); path != "" {
			return path
		}
	}
	return ""
}
