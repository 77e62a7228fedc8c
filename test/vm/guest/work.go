// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/pillionproxy/pillion/test/vm/wire"
	"golang.org/x/sys/unix"
)

// environment is what every job has.
var environment = []string{
	"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "USER=root", "LOGNAME=root",
	"TMPDIR=/tmp", "TERM=dumb", "LANG=C.UTF-8",
}

// work does the plan and returns the exit code of the first job that failed. Standard output is the line to the host.
func work() int {
	say := func(w wire.Word) { fmt.Print(w.Line()) }
	var plan wire.Plan
	b, err := os.ReadFile(wire.PlanFile)
	if err == nil {
		err = json.Unmarshal(b, &plan)
	}
	if err != nil {
		say(wire.Word{Fault: fmt.Sprintf("read the plan: %v", err)})
		return 255
	}
	if err := load(plan.Modules...); err != nil {
		say(wire.Word{Fault: err.Error()})
		return 255
	}
	code := 0
	for _, j := range plan.Jobs {
		say(wire.Word{Begin: j.Name})
		out := &lineEnd{w: os.Stdout}
		end := run(j, out)
		out.finish()
		say(wire.Word{End: &end})
		if code == 0 {
			code = end.Code
		}
	}
	return code
}

// killAfter is how long a job that is out of time may take to say where it hangs.
const killAfter = 10 * time.Second

// run runs one job to its end, and ends it when its time is over: first by SIGQUIT, at which a Go program prints what each
// of its goroutines does.
func run(j wire.Job, out io.Writer) (end wire.End) {
	end = wire.End{Job: j.Name, Code: 127}
	cmd := exec.Command(j.Path, j.Args...)
	cmd.Dir, cmd.Env = j.Dir, append(environment, j.Env...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.WaitDelay = time.Second // a process that it leaves behind may hold the pipe
	if err := cmd.Start(); err != nil {
		fmt.Fprintf(out, "%v\n", err)
		return end
	}
	quit := time.AfterFunc(j.Timeout, func() {
		end.TimedOut = true
		_ = unix.Kill(cmd.Process.Pid, unix.SIGQUIT)
	})
	kill := time.AfterFunc(j.Timeout+killAfter, func() { _ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL) })
	err := cmd.Wait()
	quit.Stop()
	kill.Stop()
	_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL) // what it left behind must not disturb the next one
	if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		end.Code = 128 + int(status.Signal())
	} else {
		end.Code = cmd.ProcessState.ExitCode()
	}
	if err != nil && !errors.As(err, new(*exec.ExitError)) {
		fmt.Fprintf(out, "%v\n", err)
	}
	if end.TimedOut && end.Code == 0 {
		end.Code = 124
	}
	return end
}

// lineEnd passes bytes on and remembers whether the last line is complete.
type lineEnd struct {
	w    io.Writer
	open bool
}

func (l *lineEnd) Write(p []byte) (int, error) {
	if len(p) > 0 {
		l.open = p[len(p)-1] != '\n'
	}
	return l.w.Write(p)
}

// finish completes the last line.
func (l *lineEnd) finish() {
	if l.open {
		_, _ = l.w.Write([]byte("\n"))
	}
}
