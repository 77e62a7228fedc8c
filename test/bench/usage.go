// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

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

// cgroupCPU is the time that all that was ever in the sidecar's cgroup has spent on a processor, to the microsecond: the
// scheduler adds to usage_usec what it adds to schedstat, in the user's and the kernel's mode, whatever controllers are on
// (Documentation/admin-guide/cgroup-v2.rst). Unlike schedstat it misses no thread or process that has ended.
func (h *host) cgroupCPU() (time.Duration, error) {
	file := filepath.Join(h.cgroup, "sidecar", "cpu.stat")
	us, err := field(file, "usage_usec")
	return time.Duration(us) * time.Microsecond, err
}

// settled is what a sidecar has spent once it spends no more: when its share of the last closes is done.
func settled(cpu func() (time.Duration, error)) (last time.Duration, err error) {
	const still, each, enough = 5 * time.Millisecond, 50 * time.Microsecond, 3
	if last, err = cpu(); err != nil {
		return 0, err
	}
	quiet := 0
	err = eventually(func() (bool, error) {
		time.Sleep(still)
		now, err := cpu()
		if quiet++; now-last > each {
			quiet = 0
		}
		last = now
		return quiet == enough, err
	})
	if err != nil {
		return 0, fmt.Errorf("wait until the sidecar is idle: %w", err)
	}
	return last, nil
}

// memory is in KiB, and what processes share is divided among them (PSS, in Documentation/filesystems/proc.rst). What the
// kernel holds for sockets is not in it.
type memory struct {
	all       float64
	anonymous float64 // without what is a file's: the rest can be paged out and is then not counted
}

// memory is that of all processes in the sidecar's cgroup.
func (h *host) memory() (sum memory, err error) {
	pids, err := processes(filepath.Join(h.cgroup, "sidecar"))
	if err != nil {
		return sum, err
	}
	for _, pid := range pids {
		file := fmt.Sprintf("/proc/%d/smaps_rollup", pid)
		all, err := field(file, "Pss:")
		if err != nil {
			return sum, err
		}
		anonymous, err := field(file, "Pss_Anon:")
		if err != nil {
			return sum, err
		}
		sum.all, sum.anonymous = sum.all+float64(all), sum.anonymous+float64(anonymous)
	}
	return sum, nil
}

// field reads the number behind a name at the beginning of a line.
func field(file, name string) (int64, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] == name {
			return strconv.ParseInt(fields[1], 10, 64)
		}
	}
	return 0, fmt.Errorf("%s: no %s", file, name)
}

// retransmits count TCP segments that a network namespace sent again. A veth pair loses nothing but what its receiver's
// queue has no room for, which is bulk. A SYN is sent again after a second, when it met what another connection has left:
// where that happens, the exchanges of `new` are not those that were meant.
type retransmits struct {
	segments int64
	syns     int64 // those of them that were SYNs or SYN+ACKs
}

// retransmitted counts those since the namespace of a process was made.
func retransmitted(pid int) (r retransmits, err error) {
	if r.segments, err = counter(fmt.Sprintf("/proc/%d/net/snmp", pid), "Tcp:", "RetransSegs"); err != nil {
		return r, err
	}
	r.syns, err = counter(fmt.Sprintf("/proc/%d/net/netstat", pid), "TcpExt:", "TCPSynRetrans")
	return r, err
}

func (r retransmits) plus(s retransmits) retransmits {
	return retransmits{r.segments + s.segments, r.syns + s.syns}
}

func (r retransmits) minus(s retransmits) retransmits {
	return retransmits{r.segments - s.segments, r.syns - s.syns}
}

// counter reads from a file that has a line of names and a line of values for each protocol.
func counter(file, protocol, name string) (int64, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	var names []string
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) == 0 || fields[0] != protocol {
			continue
		}
		if names == nil {
			names = fields
			continue
		}
		for i := range min(len(names), len(fields)) {
			if names[i] == name {
				return strconv.ParseInt(fields[i], 10, 64)
			}
		}
	}
	return 0, fmt.Errorf("%s: no %s of %s", file, name, protocol)
}
