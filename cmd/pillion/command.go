// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect/cgroup"
	"golang.org/x/sys/unix"
)

// Exit statuses of a command that did not run, as shells have them (POSIX, Shell Command Language 2.8.2).
const (
	exitNotExecutable = 126
	exitNotFound      = 127
	exitSignalled     = 128 // plus the signal's number
)

func lookCommand(name string) (string, error) {
	path, err := exec.LookPath(name)
	if errors.Is(err, exec.ErrDot) {
		err = nil // named by the user, as in any shell
	}
	switch {
	case err == nil:
		return path, nil
	case errors.Is(err, fs.ErrPermission):
		return "", &config.Fault{Err: fmt.Errorf("run %s: not executable", name), Exit: exitNotExecutable}
	default:
		return "", &config.Fault{Err: fmt.Errorf("run %s: not found", name), Hint: "put the command and its arguments behind --", Exit: exitNotFound}
	}
}

// commandGroup is the cgroup of a command and everything that it starts.
type commandGroup struct {
	path string
	dir  *cgroup.Dir
}

// groupPrefix names the cgroups of running commands.
const groupPrefix = "pillion-run-"

// newCommandGroup makes a cgroup below our own, so that limits and accounts of the session go on counting.
func newCommandGroup() (*commandGroup, error) {
	own, err := cgroup.OwnDir()
	if err != nil {
		return nil, err
	}
	defer own.Close()
	if strings.Contains(own.Path, groupPrefix) {
		return nil, &config.Fault{
			Err:  errors.New("this shell runs inside another `pillion run`"),
			Hint: "its traffic is captured already; leave the outer one first",
		}
	}
	sweepGroups(own.Path)
	path := filepath.Join(own.Path, groupPrefix+strconv.Itoa(os.Getpid()))
	if err := os.Mkdir(path, 0o755); err != nil {
		return nil, &config.Fault{
			Err:  fmt.Errorf("make a cgroup for the command: %w", err),
			Hint: "the cgroup2 file system must be writable; run it as root (sudo)",
			Exit: config.ExitNoPerm,
		}
	}
	dir, err := cgroup.Open(path)
	if err != nil {
		return nil, errors.Join(err, os.Remove(path))
	}
	return &commandGroup{path: path, dir: dir}, nil
}

// sweepGroups removes the empty groups that killed runs left behind.
func sweepGroups(parent string) {
	entries, err := os.ReadDir(parent)
	if err != nil {
		return
	}
	for _, e := range entries {
		pid, ok := strings.CutPrefix(e.Name(), groupPrefix)
		if !ok {
			continue
		}
		if n, err := strconv.Atoi(pid); err == nil && unix.Kill(n, 0) == unix.ESRCH {
			removeTree(filepath.Join(parent, e.Name())) // fails where processes are left in it
		}
	}
}

// run starts the command in the group and waits for it. The returned status is what a shell would show.
func (g *commandGroup) run(e *env, path string, args []string) (status int, err error) {
	cmd := &exec.Cmd{Path: path, Args: args, Stdin: e.stdin, Stdout: e.stdout, Stderr: e.stderr}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		UseCgroupFD: true,
		CgroupFD:    int(g.dir.Fd()),
		// Killed, we can no longer end the command, which must not go on uncaptured. The signal is tied to the thread
		// that starts it.
		Pdeathsig: syscall.SIGKILL,
	}
	if err := asInvokingUser(e, cmd); err != nil {
		return 0, err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	signals := catchSignals()
	defer signals.stop()
	if err := cmd.Start(); err != nil {
		return 0, &config.Fault{Err: fmt.Errorf("start %s: %w", path, err), Exit: exitNotExecutable}
	}
	signals.passTo(cmd.Process)
	err = cmd.Wait()
	if cmd.ProcessState == nil {
		return 0, fmt.Errorf("wait for %s: %w", path, err)
	}
	ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ws.Signaled() {
		return exitSignalled + int(ws.Signal()), nil
	}
	return ws.ExitStatus(), nil
}

// asInvokingUser makes the command run as whoever called sudo.
func asInvokingUser(e *env, cmd *exec.Cmd) error {
	id := e.getenv("SUDO_UID")
	if id == "" || os.Geteuid() != 0 {
		return nil
	}
	u, err := user.LookupId(id)
	if err != nil {
		return &config.Fault{Err: fmt.Errorf("SUDO_UID=%s: %w", id, err), Hint: "unset SUDO_UID to run the command as root", Exit: config.ExitConfig}
	}
	uid, uerr := strconv.ParseUint(u.Uid, 10, 32)
	gid, gerr := strconv.ParseUint(u.Gid, 10, 32)
	groups, err := u.GroupIds()
	if err := errors.Join(uerr, gerr, err); err != nil {
		return fmt.Errorf("look up user %s: %w", u.Username, err)
	}
	credential := &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	for _, g := range groups {
		if n, err := strconv.ParseUint(g, 10, 32); err == nil {
			credential.Groups = append(credential.Groups, uint32(n))
		}
	}
	cmd.SysProcAttr.Credential = credential
	cmd.Env = append(os.Environ(), "HOME="+u.HomeDir, "USER="+u.Username, "LOGNAME="+u.Username)
	return nil
}

// graceAfterCommand is how long processes that the command left may take to end.
const graceAfterCommand = 2 * time.Second

// end waits for the processes that the command left, or ends them: they must not go on uncaptured.
func (g *commandGroup) end(stderr io.Writer, wait bool) error {
	if wait {
		return g.waitEmpty(0)
	}
	pids, err := g.pids()
	if err != nil || len(pids) == 0 {
		return err
	}
	fmt.Fprintf(stderr, "pillion: ending %d processes that the command left in the background (--wait-all waits for them)\n", len(pids))
	for _, pid := range pids {
		unix.Kill(pid, unix.SIGTERM)
	}
	if err := g.waitEmpty(graceAfterCommand); err == nil {
		return nil
	}
	if err := g.kill(); err != nil {
		return fmt.Errorf("kill what the command left: %w", err)
	}
	return g.waitEmpty(graceAfterCommand)
}

// kill ends every process of the group, all at once where the kernel can (5.14).
func (g *commandGroup) kill() error {
	err := os.WriteFile(filepath.Join(g.path, "cgroup.kill"), []byte("1"), 0)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	pids, err := g.pids()
	for _, pid := range pids {
		unix.Kill(pid, unix.SIGKILL)
	}
	return err
}

// pids lists the processes of the group and of the groups that the command made below it.
func (g *commandGroup) pids() (pids []int, err error) {
	err = filepath.WalkDir(g.path, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil // gone meanwhile
		}
		b, err := os.ReadFile(filepath.Join(p, "cgroup.procs"))
		if err != nil {
			return nil
		}
		for _, f := range strings.Fields(string(b)) {
			if pid, err := strconv.Atoi(f); err == nil && pid != 0 {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	return pids, err
}

// waitEmpty waits until no process is left, at most for the given time if it is not 0.
func (g *commandGroup) waitEmpty(most time.Duration) error {
	start := time.Now()
	for {
		pids, err := g.pids()
		if err != nil || len(pids) == 0 {
			return err
		}
		if most > 0 && time.Since(start) > most {
			return fmt.Errorf("processes %v of the command do not end", pids)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// remove takes the group away, with those that the command made in it. Processes are killed.
func (g *commandGroup) remove() error {
	defer g.dir.Close()
	if pids, err := g.pids(); err == nil && len(pids) > 0 {
		if err := errors.Join(g.kill(), g.waitEmpty(graceAfterCommand)); err != nil {
			return err
		}
	}
	if err := removeTree(g.path); err != nil {
		return fmt.Errorf("remove the command's cgroup: %w", err)
	}
	return nil
}

// removeTree removes a cgroup and those below it.
func removeTree(path string) error {
	var dirs []string
	filepath.WalkDir(path, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, p)
		}
		return nil
	})
	for _, dir := range slices.Backward(dirs) {
		if err := os.Remove(dir); err != nil {
			return err
		}
	}
	return nil
}

// setNetworkNamespace moves the calling thread, which stays locked.
func setNetworkNamespace(name string) error {
	f, err := openNamespace(name)
	if err != nil {
		return err
	}
	defer f.Close()
	runtime.LockOSThread()
	return unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
}

// execSelf replaces this process by a new run of the same program.
func execSelf(argv []string) error { return unix.Exec("/proc/self/exe", argv, os.Environ()) }
