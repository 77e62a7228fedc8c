// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Cgroup is a cgroup2 directory.
type Cgroup struct {
	Path string

	t testing.TB
}

// Cgroup makes a cgroup below the root of the cgroup2 hierarchy. At the end of the test every process in it or below it
// is killed, and it is removed.
func (n *Net) Cgroup(label string) *Cgroup {
	n.t.Helper()
	cg := &Cgroup{Path: filepath.Join(n.cgroot, n.name(label)), t: n.t}
	if err := os.Mkdir(cg.Path, 0o755); err != nil {
		n.t.Fatalf("testnet: %v", err)
	}
	n.t.Cleanup(func() {
		if err := removeCgroup(cg.Path); err != nil {
			n.t.Errorf("testnet: %v", err)
		}
	})
	return cg
}

// Child makes a cgroup below this one. It goes with it.
func (cg *Cgroup) Child(label string) *Cgroup {
	cg.t.Helper()
	child := &Cgroup{Path: filepath.Join(cg.Path, label), t: cg.t}
	if err := os.Mkdir(child.Path, 0o755); err != nil {
		cg.t.Fatalf("testnet: %v", err)
	}
	return child
}

// Existing is a cgroup below this one that somebody else has made.
func (cg *Cgroup) Existing(name string) *Cgroup {
	return &Cgroup{Path: filepath.Join(cg.Path, name), t: cg.t}
}

// Procs lists the processes in the cgroup itself, not those below it.
func (cg *Cgroup) Procs() []int { return procs(cg.Path) }

// Add moves a process into the cgroup.
func (cg *Cgroup) Add(pid int) {
	cg.t.Helper()
	if err := os.WriteFile(filepath.Join(cg.Path, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
		cg.t.Fatalf("testnet: move process %d to %s: %v", pid, cg.Path, err)
	}
}

func procs(dir string) (pids []int) {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil
	}
	for _, field := range strings.Fields(string(b)) {
		if pid, err := strconv.Atoi(field); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids
}

// removeCgroup kills what runs in the cgroup and below, and removes it. It goes on until the kernel has let go.
func removeCgroup(dir string) error {
	var err error
	gone := wait(func() bool {
		killCgroup(dir)
		if err = removeTree(dir); err == nil {
			return true
		}
		time.Sleep(5 * time.Millisecond)
		return false
	})
	if !gone {
		return fmt.Errorf("remove cgroup %s: %w", dir, err)
	}
	return nil
}

// killCgroup kills every process in the cgroup and below it: by cgroup.kill, or by pid where the kernel (< 5.14) has
// none.
func killCgroup(dir string) {
	if err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0); err == nil {
		return
	}
	for _, d := range tree(dir) {
		for _, pid := range procs(d) {
			if pid != os.Getpid() {
				_ = syscall.Kill(pid, unix.SIGKILL)
			}
		}
	}
}

// removeTree removes a cgroup and those below it, deepest first; that it is gone already is no error.
func removeTree(dir string) error {
	var errs []error
	dirs := tree(dir)
	for _, d := range slices.Backward(dirs) {
		if err := unix.Rmdir(d); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, &fs.PathError{Op: "rmdir", Path: d, Err: err})
		}
	}
	return errors.Join(errs...)
}

// tree lists a directory and the directories below it, each before its children.
func tree(dir string) (dirs []string) {
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	return dirs
}

// cgroup2Mount finds the cgroup2 hierarchy: /sys/fs/cgroup on most machines, /sys/fs/cgroup/unified on hybrid ones.
func cgroup2Mount() (string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		// proc(5): id parent major:minor root mountpoint options [optional...] - type source options
		mount, super, ok := strings.Cut(s.Text(), " - ")
		fields := strings.Fields(mount)
		if ok && len(fields) > 4 && strings.HasPrefix(super, "cgroup2 ") {
			return fields[4], nil
		}
	}
	return "", errors.New("no cgroup2 hierarchy in /proc/self/mountinfo: mount one: mount -t cgroup2 none /sys/fs/cgroup")
}
