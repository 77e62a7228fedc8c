// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/cilium/ebpf"
	"github.com/pillionproxy/pillion/bpf"
	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/cgroup"
	"golang.org/x/sys/unix"
)

// adopt notes for every TCP listener that processes of the cgroup have open already whose it is: the hooks saw only those
// that came after them. Outbound connections need nothing of the kind. It takes CAP_SYS_PTRACE; what cannot be adopted is
// an error, since inbound connections to it would pass uncaptured.
func adopt(dir *cgroup.Dir, makers *ebpf.Map, policy config.Capture) error {
	if !slices.ContainsFunc(redirect.ListeningSockets(), func(l redirect.Listening) bool { return l.Reachable() && l.UID != policy.ProxyUID }) {
		return nil
	}
	var refused []string
	for _, pid := range processes(dir.Path, policy.Selection.ExcludeCgroups) {
		uid, sockets, err := openSockets(pid)
		if uid == policy.ProxyUID {
			continue // what is nobody's is not captured, as it should be
		}
		if err == nil {
			err = adoptAll(pid, sockets, makers)
		}
		if err != nil {
			refused = append(refused, fmt.Sprintf("%s (process %d): %v", processName(pid), pid, err))
		}
	}
	if len(refused) == 0 {
		return nil
	}
	return &config.Fault{
		Err:  fmt.Errorf("listeners older than the capture cannot be captured: %s", strings.Join(refused, "; ")),
		Hint: "install the capture before these processes start, or as root; or give --ignore-open-listeners and restart them afterwards",
	}
}

// processes lists the processes of a cgroup and of those below it that can be seen from here, but for the excluded ones.
func processes(path string, excluded []string) (pids []int) {
	filepath.WalkDir(path, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil // gone meanwhile
		}
		if slices.Contains(excluded, p) {
			return fs.SkipDir
		}
		b, err := os.ReadFile(filepath.Join(p, "cgroup.procs"))
		if err != nil {
			return nil
		}
		for _, f := range strings.Fields(string(b)) {
			if pid, err := strconv.Atoi(f); err == nil && pid != 0 && pid != os.Getpid() {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	return pids
}

// openSockets lists the descriptors of a process that are sockets, and its user. A process that has ended has none.
func openSockets(pid int) (uid uint32, fds []int, err error) {
	proc := fmt.Sprintf("/proc/%d", pid)
	info, err := os.Stat(proc)
	if err != nil {
		return 0, nil, nil
	}
	uid = info.Sys().(*syscall.Stat_t).Uid
	entries, err := os.ReadDir(proc + "/fd")
	if errors.Is(err, fs.ErrPermission) {
		return uid, nil, fmt.Errorf("%w: %w", errNoLook, err)
	}
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(proc, "fd", e.Name()))
		if errors.Is(err, fs.ErrPermission) {
			return uid, nil, fmt.Errorf("%w: %w", errNoLook, err)
		}
		if !strings.HasPrefix(target, "socket:") {
			continue
		}
		if fd, err := strconv.Atoi(e.Name()); err == nil {
			fds = append(fds, fd)
		}
	}
	return uid, fds, nil
}

var (
	errMPTCP  = errors.New("an MPTCP listener, whose own socket is the kernel's")
	errNoLook = errors.New("its sockets may not be looked at, which takes CAP_SYS_PTRACE")
)

func adoptAll(pid int, fds []int, makers *ebpf.Map) error {
	if len(fds) == 0 {
		return nil
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil // it has ended
	}
	defer unix.Close(pidfd)
	var errs []error
	for _, fd := range fds {
		if err := adoptOne(pidfd, fd, makers); err != nil && !slices.ContainsFunc(errs, func(e error) bool { return e.Error() == err.Error() }) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func adoptOne(pidfd, fd int, makers *ebpf.Map) error {
	sock, err := unix.PidfdGetfd(pidfd, fd, 0)
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w: %w", errNoLook, err)
	}
	if err != nil {
		return nil // closed meanwhile
	}
	defer unix.Close(sock)
	listening, err := unix.GetsockoptInt(sock, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil || listening == 0 {
		return nil
	}
	family, _ := unix.GetsockoptInt(sock, unix.SOL_SOCKET, unix.SO_DOMAIN)
	protocol, _ := unix.GetsockoptInt(sock, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	switch {
	case family != unix.AF_INET && family != unix.AF_INET6:
		return nil
	case protocol == unix.IPPROTO_MPTCP:
		return errMPTCP
	case protocol != unix.IPPROTO_TCP:
		return nil
	}
	if err := makers.Put(int32(sock), uint32(bpf.CaptureMakerMAKER_APP)); err != nil {
		return fmt.Errorf("note whose listener it is: %w", err)
	}
	return nil
}

func processName(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return "?"
	}
	return strings.TrimSpace(string(b))
}
