// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/pillionproxy/pillion/config"
	"golang.org/x/sys/unix"
)

// lab is one server and a host for each subject, joined to it by a veth pair each.
type lab struct {
	dir     string // holds copies of the two programs, which the sidecar's user must be able to run
	self    string
	pillion string
	cgroups string // where cgroup2 is mounted
	server  *host
	serving *exec.Cmd // the server itself
	hosts   map[string]*host
	undo    []func() error // in the order of doing
}

// host is a network namespace, and a cgroup with the children app and sidecar.
type host struct {
	lab     *lab
	netns   string            // its name
	number  int               // from 1 on, of those that are joined to the server
	address string            // its own, IPv4
	peer    string            // the device of the server that is joined to it
	cgroup  string            // its path
	server  map[string]string // the server's address as seen from here, by family; in brackets where IPv6
	sidecar *exec.Cmd         // what carries; nil where nothing does
	through []string          // what starts a client
	carried bool              // it comes by a sidecar
	log     string            // what the sidecar prints
}

// newLab starts the server, which is a role of this program. What it returns must be closed, also beside an error.
func newLab(ctx context.Context, pillion string, server ...string) (*lab, error) {
	l := &lab{hosts: map[string]*host{}}
	// The children of a program that is killed become ours; a container's init may not wait for them.
	err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
	if err != nil {
		return l, err
	}
	if l.cgroups, err = cgroup2(); err != nil {
		return l, err
	}
	if l.dir, err = os.MkdirTemp("", "pillion-bench."); err != nil {
		return l, err
	}
	l.undo = append(l.undo, func() error { return os.RemoveAll(l.dir) })
	if err := os.Chmod(l.dir, 0o755); err != nil {
		return l, err
	}
	self, err := os.Executable()
	if err != nil {
		return l, err
	}
	l.self, l.pillion = filepath.Join(l.dir, "bench"), filepath.Join(l.dir, "pillion")
	if err := errors.Join(copyProgram(self, l.self), copyProgram(pillion, l.pillion)); err != nil {
		return l, err
	}
	if l.server, err = l.newHost(ctx, "server"); err != nil {
		return l, err
	}
	l.serving, err = l.server.start(l.server.command(ctx, "app", append([]string{l.self}, server...)...), true)
	return l, err
}

// close removes everything, last things first.
func (l *lab) close() error {
	var errs []error
	for i := len(l.undo) - 1; i >= 0; i-- {
		errs = append(errs, l.undo[i]())
	}
	// What programs left behind that were killed; ours have all been waited for.
	for {
		if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); err == unix.EINTR {
			continue
		} else if err != nil || pid == 0 {
			return errors.Join(errs...)
		}
	}
}

func (l *lab) newHost(ctx context.Context, label string) (*host, error) {
	name := fmt.Sprintf("pillion-bench-%d-%s", os.Getpid(), label)
	h := &host{lab: l, netns: name, cgroup: filepath.Join(l.cgroups, name), log: filepath.Join(l.dir, label+".log")}
	if err := ip(ctx, "netns", "add", name); err != nil {
		return nil, err
	}
	l.undo = append(l.undo, func() error { return ip(context.Background(), "netns", "del", name) })
	for _, dir := range []string{h.cgroup, filepath.Join(h.cgroup, "app"), filepath.Join(h.cgroup, "sidecar")} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, err
		}
		l.undo = append(l.undo, func() error { return removeCgroup(dir) })
	}
	// Congestion control is inherited from the host, which may use BBR. Timestamps without an offset for each connection
	// keep REDIRECT from meeting the relay's own TIME_WAIT; all hosts get them, for a fair comparison.
	err := h.run(ctx, "", "sh", "-c", `ip link set lo up
		cd /proc/sys/net && echo 2 >ipv4/tcp_timestamps && echo 0 >ipv6/conf/default/accept_dad
		echo cubic >ipv4/tcp_congestion_control || echo reno >ipv4/tcp_congestion_control`)
	return h, err
}

// join makes the host of a subject, joined to the server.
func (l *lab) join(ctx context.Context, subject string) (*host, error) {
	h, err := l.newHost(ctx, subject)
	if err != nil {
		return nil, err
	}
	l.hosts[subject] = h
	n := len(l.hosts)
	h.number, h.address, h.peer = n, fmt.Sprintf("10.202.%d.1", n), fmt.Sprintf("bench%d", n)
	h.server = map[string]string{"IPv4": fmt.Sprintf("10.202.%d.2", n), "IPv6": fmt.Sprintf("[fd2b:%d::2]", n)}
	if err := ip(ctx, "link", "add", "eth0", "netns", h.netns, "type", "veth", "peer", "name", h.peer, "netns", l.server.netns); err != nil {
		return nil, err
	}
	for i, end := range []struct{ netns, device string }{{h.netns, "eth0"}, {l.server.netns, h.peer}} {
		for _, args := range [][]string{
			{"addr", "add", fmt.Sprintf("10.202.%d.%d/24", n, i+1), "dev", end.device},
			{"addr", "add", fmt.Sprintf("fd2b:%d::%d/64", n, i+1), "dev", end.device, "nodad"},
			{"link", "set", end.device, "up"},
		} {
			if err := ip(ctx, append([]string{"-n", end.netns}, args...)...); err != nil {
				return nil, err
			}
		}
	}
	return h, nil
}

// redirect has iptables send to the sidecar what anybody but its user dials.
func (h *host) redirect(ctx context.Context) error {
	for _, program := range []string{"iptables", "ip6tables"} {
		err := h.run(ctx, "", program, "-w", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "!", "-o", "lo",
			"-m", "owner", "!", "--uid-owner", strconv.Itoa(int(config.ProxyUID)),
			"-j", "REDIRECT", "--to-ports", strconv.Itoa(int(config.PortOutbound)))
		if err != nil {
			return err
		}
	}
	return nil
}

// capture has Pillion do the same for what is in the host's cgroup.
func (h *host) capture(ctx context.Context, flags ...string) error {
	return h.install(ctx, []string{"--cgroup", h.cgroup}, flags...)
}

// install has Pillion capture a cgroup, or without one the whole namespace, and give it back at the end.
func (h *host) install(ctx context.Context, where []string, flags ...string) error {
	if err := h.run(ctx, "", slices.Concat([]string{h.lab.pillion, "init"}, where, flags)...); err != nil {
		return err
	}
	h.lab.undo = append(h.lab.undo, func() error {
		return h.run(context.Background(), "", append([]string{h.lab.pillion, "clean"}, where...)...)
	})
	return nil
}

func (h *host) startSidecar(ctx context.Context, saysReady bool, args ...string) (err error) {
	h.sidecar, err = h.start(h.sidecarCommand(ctx, args...), saysReady)
	h.carried = true
	return err
}

// sidecarCommand prepares a program as a sidecar is in a pod: uid 1666, CAP_NET_RAW and nothing else.
func (h *host) sidecarCommand(ctx context.Context, args ...string) *exec.Cmd {
	id := strconv.Itoa(int(config.ProxyUID))
	return h.command(ctx, "sidecar", append([]string{
		"setpriv", "--reuid", id, "--regid", id, "--clear-groups", "--no-new-privs",
		"--inh-caps=-all,+net_raw", "--ambient-caps=-all,+net_raw", "--bounding-set=-all,+net_raw",
	}, args...)...)
}

// command prepares a program in the namespace of the host and in a child of its cgroup; no child: in the caller's own.
func (h *host) command(ctx context.Context, child string, args ...string) *exec.Cmd {
	// Not `ip netns exec`: it mounts a /sys in which the cgroups of the host cannot be seen.
	args = append([]string{"--net=/run/netns/" + h.netns, "--"}, args...)
	if child != "" {
		args = append([]string{"-c", `echo $$ >"$0" && exec nsenter "$@"`, filepath.Join(h.cgroup, child, "cgroup.procs")}, args...)
		return exec.CommandContext(ctx, "sh", args...)
	}
	return exec.CommandContext(ctx, "nsenter", args...)
}

// run runs a program to its end.
func (h *host) run(ctx context.Context, child string, args ...string) error {
	if out, err := h.command(ctx, child, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// start starts a program that is killed when the lab closes. One that says when it is ready is waited for.
func (h *host) start(cmd *exec.Cmd, saysReady bool) (*exec.Cmd, error) {
	log, err := os.Create(h.log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd.Stderr = log
	var out io.ReadCloser
	if cmd.Stdout = log; saysReady {
		cmd.Stdout = nil
		if out, err = cmd.StdoutPipe(); err != nil {
			return nil, err
		}
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	h.lab.undo = append(h.lab.undo, func() error {
		_ = cmd.Process.Signal(syscall.SIGKILL)
		_ = cmd.Wait() // its error is the signal
		return nil
	})
	if saysReady {
		if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
			text, _ := os.ReadFile(h.log)
			return nil, fmt.Errorf("%s did not become ready: %q %w\n%s", strings.Join(cmd.Args, " "), line, err, text)
		}
	}
	return cmd, nil
}

func ip(ctx context.Context, args ...string) error {
	if out, err := exec.CommandContext(ctx, "ip", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// explained adds what the program said on standard error.
func explained(err error) error {
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return fmt.Errorf("%w: %s", err, exit.Stderr)
	}
	return err
}

func copyProgram(from, to string) error {
	content, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, content, 0o755)
}

// removeCgroup ends what still runs in it: a program that was killed leaves its children behind.
func removeCgroup(dir string) error {
	if err := emptyCgroup(dir); err != nil {
		return err
	}
	err := eventually(func() (bool, error) { return syscall.Rmdir(dir) == nil, nil })
	if err != nil {
		return fmt.Errorf("remove the cgroup %s: %w", dir, err)
	}
	return nil
}

// emptyCgroup kills what is in it, and waits until it is gone.
func emptyCgroup(dir string) error {
	err := eventually(func() (bool, error) {
		pids, err := processes(dir)
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended
		}
		return len(pids) == 0, err
	})
	if err != nil {
		return fmt.Errorf("kill what is in the cgroup %s: %w", dir, err)
	}
	return nil
}

// processes are those of a cgroup.
func processes(cgroup string) ([]int, error) {
	text, err := os.ReadFile(filepath.Join(cgroup, "cgroup.procs"))
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, field := range strings.Fields(string(text)) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// patience bounds every wait for a condition. It is no measure of anything: a wait that ends there has failed.
const patience = 10 * time.Second

// eventually waits for a condition.
func eventually(cond func() (bool, error)) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if ok, err := cond(); ok || err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("waited in vain for %s", patience)
		}
	}
}

func cgroup2() (string, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(text)) {
		mount, source, _ := strings.Cut(line, " - ")
		if fields := strings.Fields(mount); len(fields) > 4 && strings.HasPrefix(source, "cgroup2 ") {
			return fields[4], nil
		}
	}
	return "", errors.New("no cgroup2 hierarchy is mounted")
}
