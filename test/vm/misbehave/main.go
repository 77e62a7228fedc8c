// SPDX-License-Identifier: Apache-2.0

// Command misbehave does to a virtual machine what tests and kernels do to it on a bad day. The tests of test/vm run it to
// see each of them reported.
//
// What always holds: it runs only as a job of a guest; anywhere else it does nothing.
package main

import (
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/pillionproxy/pillion/test/vm/wire"
	"golang.org/x/sys/unix"
)

func main() {
	if _, err := os.Stat(wire.PlanFile); err != nil || len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "misbehave: this is no guest of test/vm")
		os.Exit(64)
	}
	fmt.Println("about to", os.Args[1])
	switch os.Args[1] {
	case "exit":
		code, _ := strconv.Atoi(os.Args[2])
		os.Exit(code)
	case "panic": // of the kernel
		write("/proc/sysrq-trigger", "c")
	case "oops": // the kernel's words; a real one is a panic as well, by the command line
		write("/dev/kmsg", "<0>Oops: 0002 [#1] SMP, said misbehave")
	case "warn":
		write("/dev/kmsg", "<4>WARNING: CPU: 0 PID: 1 at misbehave")
	case "hang":
		time.Sleep(time.Hour)
	case "freeze": // the guest's runner, so that nobody in the guest ends anything
		_ = unix.Kill(os.Getppid(), unix.SIGSTOP)
		time.Sleep(time.Hour)
	case "reboot":
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	}
}

func write(file, text string) {
	if err := os.WriteFile(file, []byte(text), 0); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(3)
	}
	time.Sleep(2 * time.Second) // a kernel that goes on says so on its console a moment later
}
