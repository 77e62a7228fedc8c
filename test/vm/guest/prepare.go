// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// mounts is what is mounted, in order. Where a kernel lacks a file system that is no fault: it is a fact for the tests.
var mounts = []struct {
	kind, at, options string
	needed            bool
}{
	{"proc", "/proc", "", true},
	{"sysfs", "/sys", "", true},
	{"devtmpfs", "/dev", "", true},
	{"devpts", "/dev/pts", "ptmxmode=0666", true},
	{"tmpfs", "/dev/shm", "mode=1777", true},
	{"tmpfs", "/run", "mode=0755", true},
	{"tmpfs", "/tmp", "mode=1777", true},
	{"cgroup2", "/sys/fs/cgroup", "", true},
	{"bpf", "/sys/fs/bpf", "", false},
	{"tracefs", "/sys/kernel/tracing", "", false},
	{"debugfs", "/sys/kernel/debug", "", false},
	{"securityfs", "/sys/kernel/security", "", false},
}

// limits are those of a service that has been given what BPF takes before Linux 5.11, and as many files as systemd allows.
var limits = []struct {
	resource int
	limit    unix.Rlimit
}{
	{unix.RLIMIT_MEMLOCK, unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}},
	{unix.RLIMIT_NOFILE, unix.Rlimit{Cur: 1024, Max: 524288}},
	{unix.RLIMIT_NPROC, unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}},
}

// prepare makes the machine what a node is before its first service, and opens the line to the host.
func prepare() (line *os.File, err error) {
	unix.Umask(0o022)
	if err := pivotable(); err != nil {
		return nil, err
	}
	for _, m := range mounts {
		if err := os.MkdirAll(m.at, 0o755); err == nil {
			err = unix.Mount(m.kind, m.at, m.kind, 0, m.options)
			if err != nil && m.needed {
				return nil, fmt.Errorf("mount %s on %s: %w", m.kind, m.at, err)
			}
		} else if m.needed {
			return nil, err
		}
	}
	for link, to := range map[string]string{"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2"} {
		if err := os.Symlink(to, link); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, err
		}
	}
	if line, err = openLine("/dev/ttyS1"); err != nil {
		return nil, err
	}
	// As systemd has it; the kernel starts with a private one.
	if err := unix.Mount("", "/", "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		return line, fmt.Errorf("share /: %w", err)
	}
	for _, l := range limits {
		if err := unix.Setrlimit(l.resource, &l.limit); err != nil {
			return line, fmt.Errorf("set limit %d: %w", l.resource, err)
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return line, fmt.Errorf("set lo up: %w", err)
	}
	return line, unix.Sethostname([]byte("vm"))
}

// pivotable gives the machine a root that a container's runtime can leave: pivot_root(2) refuses the one that a kernel
// unpacks its initramfs to, which is not mounted on anything.
func pivotable() error {
	const at = "/mnt"
	if err := errors.Join(os.MkdirAll(at, 0o755), unix.Mount("/", at, "", unix.MS_BIND, ""), os.Chdir(at)); err != nil {
		return fmt.Errorf("bind the root: %w", err)
	}
	if err := errors.Join(unix.Mount(".", "/", "", unix.MS_MOVE, ""), unix.Chroot("."), os.Chdir("/")); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	return nil
}

// openLine opens a serial line that passes bytes on as they are.
func openLine(path string) (*os.File, error) {
	line, err := os.OpenFile(path, os.O_WRONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	t, err := unix.IoctlGetTermios(int(line.Fd()), unix.TCGETS)
	if err == nil {
		t.Oflag &^= unix.OPOST
		t.Lflag &^= unix.ECHO | unix.ICANON | unix.ISIG
		t.Cflag = t.Cflag&^unix.CBAUD | unix.B115200
		err = unix.IoctlSetTermios(int(line.Fd()), unix.TCSETS, t)
	}
	if err != nil {
		return nil, fmt.Errorf("serial line %s: %w", path, err)
	}
	return line, nil
}
