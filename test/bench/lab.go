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
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/pillionproxy/pillion/config"
)

// lab is one server and a host for each subject, joined to it by a veth pair each.
type lab struct {
	dir     string // holds copies of the two programs, which the sidecar's user must be able to run
	self    string
	pillion string
	cgroups string // where cgroup2 is mounted
	server  *host
	hosts   map[string]*host
	undo    []func() error // in the order of doing
}

// host is a network namespace, and a cgroup with the children app and sidecar.
type host struct {
	lab     *lab
	netns   string            // its name
	cgroup  string            // its path
	server  map[string]string // the server's address as seen from here, by family; in brackets where IPv6
	sidecar *exec.Cmd         // what carries; nil where nothing does
	through []string          // what starts a client
	carried bool              // it comes by a sidecar
	log     string            // what the sidecar prints
}

// newLab starts the server. What it returns must be closed, also beside an error.
func newLab(ctx context.Context, pillion string) (*lab, error) {
	l := &lab{hosts: map[string]*host{}}
	var err error
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
	_, err = l.server.start(l.server.command(ctx, "app", l.self, "server"), true)
	return l, err
}

// close removes everything, last things first.
func (l *lab) close() error {
	var errs []error
	for i := len(l.undo) - 1; i >= 0; i-- {
		errs = append(errs, l.undo[i]())
	}
	return errors.Join(errs...)
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

// prepare makes the host of a subject and starts what the subject has.
func (l *lab) prepare(ctx context.Context, subject string) error {
	h, err := l.newHost(ctx, subject)
	if err != nil {
		return err
	}
	l.hosts[subject] = h
	n := len(l.hosts)
	h.server = map[string]string{"IPv4": fmt.Sprintf("10.202.%d.2", n), "IPv6": fmt.Sprintf("[fd2b:%d::2]", n)}
	device := fmt.Sprintf("bench%d", n)
	if err := ip(ctx, "link", "add", "eth0", "netns", h.netns, "type", "veth", "peer", "name", device, "netns", l.server.netns); err != nil {
		return err
	}
	for i, end := range []struct{ netns, device string }{{h.netns, "eth0"}, {l.server.netns, device}} {
		for _, args := range [][]string{
			{"addr", "add", fmt.Sprintf("10.202.%d.%d/24", n, i+1), "dev", end.device},
			{"addr", "add", fmt.Sprintf("fd2b:%d::%d/64", n, i+1), "dev", end.device, "nodad"},
			{"link", "set", end.device, "up"},
		} {
			if err := ip(ctx, append([]string{"-n", end.netns}, args...)...); err != nil {
				return err
			}
		}
	}

	switch subject {
	case "redirect+relay":
		for _, program := range []string{"iptables", "ip6tables"} {
			err := h.run(ctx, "", program, "-w", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "!", "-o", "lo",
				"-m", "owner", "!", "--uid-owner", strconv.Itoa(int(config.ProxyUID)),
				"-j", "REDIRECT", "--to-ports", strconv.Itoa(int(config.PortOutbound)))
			if err != nil {
				return err
			}
		}
		return h.startSidecar(ctx, true, l.self, "relay")
	case "capture+relay":
		if err := h.startSidecar(ctx, true, l.self, "relay", "-transparent"); err != nil {
			return err
		}
		return h.capture(ctx)
	case "pillion":
		if err := h.startSidecar(ctx, false, l.pillion, "proxy", "--admin", "none", "--log-format", "json"); err != nil {
			return err
		}
		return h.capture(ctx)
	case "rootless":
		return h.startRootless(ctx)
	case "slirp4netns":
		return h.startSlirp(ctx)
	case "slirp4netns-64k":
		return h.startSlirp(ctx, "--mtu=65520")
	}
	return nil
}

// startRootless has a user without rights run a command that does nothing; the clients go into its namespaces.
func (h *host) startRootless(ctx context.Context) (err error) {
	const nobody = "65534"
	h.carried = true
	h.sidecar, err = h.start(h.command(ctx, "", "setpriv", "--reuid", nobody, "--regid", nobody, "--clear-groups", "--inh-caps=-all", "--bounding-set=-all",
		h.lab.pillion, "run", "--backend", "rootless", "--report", "none", "--", "sh", "-c", "echo ready; exec sleep 100000"), true)
	if err != nil {
		return err
	}
	pid := h.sidecar.Process.Pid
	for _, what := range []string{"keeper", "command"} {
		files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
		if err != nil {
			return err
		}
		var children []string
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			children = append(children, strings.Fields(string(text))...)
		}
		if len(children) != 1 {
			return fmt.Errorf("find the %s of `pillion run`: the processes below %d are %q", what, pid, children)
		}
		if pid, err = strconv.Atoi(children[0]); err != nil {
			return err
		}
	}
	h.enter(pid)
	return nil
}

// enter has the clients run in the user and network namespace of a process.
func (h *host) enter(pid int) {
	h.through = []string{"nsenter", "--user", "--net", "--preserve-credentials", "--target", strconv.Itoa(pid)}
}

// startSlirp makes a user and a network namespace, and a stack in user space between it and the host's.
func (h *host) startSlirp(ctx context.Context, flags ...string) error {
	inner, err := h.start(h.command(ctx, "", "unshare", "--user", "--map-root-user", "--net", "sh", "-c", "echo ready; exec sleep 100000"), true)
	if err != nil {
		return err
	}
	ready, readyWriter, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	args := append([]string{"slirp4netns", "--configure", "--enable-ipv6", "--ready-fd=3"}, flags...)
	slirp := h.command(ctx, "", append(args, strconv.Itoa(inner.Process.Pid), "tap0")...)
	slirp.ExtraFiles = []*os.File{readyWriter}
	h.sidecar, err = h.start(slirp, false)
	_ = readyWriter.Close()
	if err != nil {
		return err
	}
	if _, err := ready.Read(make([]byte, 1)); err != nil {
		text, _ := os.ReadFile(h.log)
		return fmt.Errorf("slirp4netns did not become ready: %w\n%s", err, text)
	}
	h.enter(inner.Process.Pid)
	return nil
}

func (h *host) capture(ctx context.Context) error {
	err := h.run(ctx, "", h.lab.pillion, "init", "--cgroup", h.cgroup)
	h.lab.undo = append(h.lab.undo, func() error {
		return h.run(context.Background(), "", h.lab.pillion, "clean", "--cgroup", h.cgroup)
	})
	return err
}

// startSidecar starts a sidecar as its user is in a pod: uid 1666, CAP_NET_RAW and nothing else.
func (h *host) startSidecar(ctx context.Context, saysReady bool, args ...string) (err error) {
	id := strconv.Itoa(int(config.ProxyUID))
	h.sidecar, err = h.start(h.command(ctx, "sidecar", append([]string{
		"setpriv", "--reuid", id, "--regid", id, "--clear-groups", "--no-new-privs",
		"--inh-caps=-all,+net_raw", "--ambient-caps=-all,+net_raw", "--bounding-set=-all,+net_raw",
	}, args...)...), saysReady)
	h.carried = true
	return err
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

// cpu is the time that the threads of the sidecar have spent on a processor, to the nanosecond (schedstat, in
// Documentation/scheduler/sched-stats.rst of the kernel). It misses threads that have ended: Go's seldom do.
func (h *host) cpu() (time.Duration, error) {
	if h.sidecar == nil {
		return 0, nil
	}
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", h.sidecar.Process.Pid))
	if err != nil || len(files) == 0 {
		text, _ := os.ReadFile(h.log)
		return 0, fmt.Errorf("the sidecar is gone: %w\n%s", err, text)
	}
	var sum time.Duration
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return 0, err
		}
		onCPU, _, _ := strings.Cut(string(text), " ")
		ns, err := strconv.ParseInt(onCPU, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", file, err)
		}
		sum += time.Duration(ns)
	}
	return sum, nil
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

// removeCgroup waits a little for the kernel to let go of the processes that were in it.
func removeCgroup(dir string) (err error) {
	for range 100 {
		if err = syscall.Rmdir(dir); err == nil {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return fmt.Errorf("remove the cgroup %s: %w", dir, err)
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
