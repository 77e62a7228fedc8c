// SPDX-License-Identifier: Apache-2.0

// Package machine boots a kernel in QEMU, without hardware help, and hears what its guest has to say.
//
// What always holds: a run passes only if the guest said so on its serial line and QEMU ended with the status that says
// the same; a machine that panics, stops or hangs is ended, and its Result says which, with its last lines; no process
// and no file of it is left.
package machine

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/test/vm/wire"
	"golang.org/x/sys/unix"
)

// Program is QEMU, by the name that Debian gives it.
const Program = "qemu-system-x86_64"

// Config is one machine.
type Config struct {
	Image   []byte // bzImage
	Initrd  string // file
	Memory  int    // MiB
	Timeout time.Duration
	Dir     string // for files while the machine runs
	// Output is given each line that a job prints, Console each line of the kernel. They are called one at a time.
	Output, Console func(line string)
	// Begin and End are called when a job begins and has ended.
	Begin func(job string)
	End   func(wire.End)
}

// Result is what a run came to.
type Result struct {
	Code     int // of the first job that failed; meaningless where Err is set
	Err      error
	Findings []Finding
	Last     []string // the end of everything that the machine said
	Booted   time.Duration
	Took     time.Duration
}

// Check tells whether there is a QEMU.
func Check() error {
	if _, err := exec.LookPath(Program); err != nil {
		return &config.Fault{Err: err, Hint: "apt-get install --no-install-recommends qemu-system-x86"}
	}
	return nil
}

// commandLine is what the kernel is told. An oops is a panic, and a panic ends the machine; softlockups are not looked
// for, since a busy host causes them.
const commandLine = "console=ttyS0 loglevel=5 panic=-1 oops=panic reboot=t nowatchdog mitigations=off random.trust_cpu=on"

// Run boots the machine and waits for its end.
func Run(ctx context.Context, c Config) (result Result) {
	began := time.Now()
	defer func() { result.Took = time.Since(began) }()
	image := filepath.Join(c.Dir, "vmlinuz")
	if err := os.WriteFile(image, c.Image, 0o600); err != nil {
		result.Err = err
		return result
	}
	defer os.Remove(image)
	h := hearer{c: c, began: began}
	status, err := h.qemu(ctx, image)
	result.Findings, result.Last, result.Booted = h.findings, h.last.end(), h.booted
	if h.exit != nil {
		result.Code = *h.exit
	}
	result.Err = h.verdict(status, err)
	return result
}

// hearer collects what a machine says.
type hearer struct {
	c     Config
	began time.Time

	mu       sync.Mutex
	booted   time.Duration
	exit     *int
	faults   []string
	findings []Finding
	last     lastLines
}

// errTimeout is what a machine that is not done in time is ended with.
var errTimeout = errors.New("not done in time")

// qemu runs QEMU and returns its exit status.
func (h *hearer) qemu(ctx context.Context, image string) (status int, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, h.c.Timeout, errTimeout)
	defer cancel()
	consoleRead, consoleWrite, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	outputRead, outputWrite, err := os.Pipe()
	if err != nil {
		consoleRead.Close()
		consoleWrite.Close()
		return 0, err
	}
	cmd := exec.CommandContext(ctx, Program,
		"-accel", "tcg", "-M", "q35", "-cpu", "max", "-smp", "1", "-m", strconv.Itoa(h.c.Memory),
		"-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-no-reboot",
		"-chardev", "file,id=console,path=/dev/fd/3", "-serial", "chardev:console",
		"-chardev", "file,id=output,path=/dev/fd/4", "-serial", "chardev:output",
		"-device", fmt.Sprintf("isa-debug-exit,iobase=%#x,iosize=1", wire.ExitPort),
		"-kernel", image, "-initrd", h.c.Initrd, "-append", commandLine)
	cmd.ExtraFiles = []*os.File{consoleWrite, outputWrite}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL, Setpgid: true}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	done := make(chan struct{})
	defer close(done)
	err = startOnThread(cmd, done)
	consoleWrite.Close()
	outputWrite.Close()
	var readers sync.WaitGroup
	readers.Go(func() { h.read(consoleRead, h.kernelLine) })
	readers.Go(func() { h.read(outputRead, h.guestLine) })
	if err == nil {
		err = cmd.Wait()
	}
	readers.Wait()
	switch exit := (*exec.ExitError)(nil); {
	case ctx.Err() != nil && h.exit == nil:
		return 0, context.Cause(ctx)
	case errors.As(err, &exit):
		if stderr.Len() > 0 {
			return exit.ExitCode(), fmt.Errorf("%s: %w: %s", Program, err, strings.TrimSpace(stderr.String()))
		}
		return exit.ExitCode(), nil
	default:
		return 0, err
	}
}

// startOnThread starts a command whose Pdeathsig is sent when the thread that forked it ends, on a thread that lives until
// done is closed.
func startOnThread(cmd *exec.Cmd, done <-chan struct{}) error {
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		started <- cmd.Start()
		<-done
		runtime.UnlockOSThread()
	}()
	return <-started
}

// read reads lines until the other end is closed.
func (h *hearer) read(f *os.File, line func(string)) {
	defer f.Close()
	for r := bufio.NewReader(f); ; {
		text, err := r.ReadString('\n')
		if text = clean(text); text != "" {
			h.mu.Lock()
			line(text)
			h.mu.Unlock()
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				h.mu.Lock()
				h.faults = append(h.faults, err.Error())
				h.mu.Unlock()
			}
			return
		}
	}
}

// kernelLine hears the first serial line.
func (h *hearer) kernelLine(line string) {
	if _, ok := wire.Parse(line); ok {
		h.guestLine(line) // the guest had no other line to speak on
		return
	}
	h.last.add(line)
	if f, ok := judge(line); ok {
		h.findings = append(h.findings, f)
	}
	h.c.Console(line)
}

// guestLine hears the second one.
func (h *hearer) guestLine(line string) {
	w, ok := wire.Parse(line)
	switch {
	case !ok:
		h.last.add(line)
		h.c.Output(line)
	case w.Begin != "":
		if h.booted == 0 {
			h.booted = time.Since(h.began)
		}
		h.c.Begin(w.Begin)
	case w.End != nil:
		h.c.End(*w.End)
	case w.Fault != "":
		h.faults = append(h.faults, w.Fault)
		h.last.add("guest: " + w.Fault)
	case w.Exit != nil:
		h.exit = w.Exit
	}
}

// verdict says what went wrong with the machine itself; nil if its exit code is to be believed.
func (h *hearer) verdict(status int, err error) error {
	for _, f := range h.findings {
		if f.Fatal {
			return fmt.Errorf("the kernel failed: %s", f.Line)
		}
	}
	switch {
	case errors.Is(err, errTimeout):
		return fmt.Errorf("the machine hangs: %w (%s), and was ended", err, h.c.Timeout)
	case err != nil:
		return err
	case len(h.faults) > 0:
		return fmt.Errorf("the guest failed: %s", strings.Join(h.faults, "; "))
	case h.exit == nil:
		return fmt.Errorf("the machine ended without a word (QEMU's exit status %d)", status)
	case !wire.Agree(status, *h.exit):
		return fmt.Errorf("the guest says that its exit code is %d, but QEMU ended with %d", *h.exit, status)
	}
	return nil
}
