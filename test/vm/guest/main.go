// SPDX-License-Identifier: Apache-2.0

// Command guest is the first process of a virtual machine of test/vm. It mounts what a node of today has mounted, with a
// pure cgroup2 hierarchy, loads kernel modules, runs the jobs of its plan one after the other, and ends the machine.
//
// What always holds: process 1 only reaps and ends the machine, everything else happens in a child of it; the kernel's
// messages go to the first serial line alone, what jobs print and the guest's own words to the second. The kernel runs
// the same program as /sbin/modprobe.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/pillionproxy/pillion/test/vm/wire"
	"golang.org/x/sys/unix"
)

func main() {
	switch {
	case filepath.Base(os.Args[0]) == "modprobe":
		if err := modprobe(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, "modprobe:", err)
			os.Exit(1)
		}
	case os.Getpid() == 1:
		first()
	default:
		os.Exit(work())
	}
}

// first is process 1.
func first() {
	code := 255
	line, err := prepare()
	if err == nil {
		code, err = reap(line)
	}
	if line == nil {
		line = os.Stdout // the kernel's console
	}
	if err != nil {
		fmt.Fprint(line, wire.Word{Fault: err.Error()}.Line())
	}
	fmt.Fprint(line, wire.Word{Exit: &code}.Line())
	unix.Sync()
	_ = unix.IoctlSetInt(int(line.Fd()), unix.TCSBRK, 1) // wait until it is sent
	leave(wire.ExitByte(code))
}

// reap starts the child that does the work, waits for every process that ends, and returns the child's exit code.
func reap(line *os.File) (int, error) {
	child := exec.Command("/proc/self/exe")
	child.Stdout, child.Stderr = line, line
	if err := child.Start(); err != nil {
		return 255, err
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 255, fmt.Errorf("wait: %w", err)
		case pid != child.Process.Pid:
		case status.Signaled():
			return 255, fmt.Errorf("the guest's runner was ended by %v", status.Signal())
		default:
			return status.ExitStatus(), nil
		}
	}
}

// leave ends the machine through the debug-exit device. Where there is none it falls back to a reboot, which the host
// sees as a machine that has no verdict.
func leave(status byte) {
	if err := unix.Iopl(3); err != nil {
		fmt.Println("iopl:", err)
	}
	out(wire.ExitPort, status)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	select {}
}
