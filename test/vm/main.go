// SPDX-License-Identifier: Apache-2.0

// Command vm boots real kernels in QEMU and runs test programs in them: the tests of this tree that face the kernel, or any
// static program. The kernels are Debian's, the newest of each wanted series, fetched once and kept outside the tree.
//
// What always holds: a run passes only if every kernel that was asked for booted and said that its jobs passed; a kernel
// that cannot be had, that panics or that hangs fails the run, with its last lines; no test knows that it runs in a
// machine, and none is written for it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/test/vm/debian"
)

const usage = `usage: vm [FLAGS]                          the tests of this tree that face the kernel
       vm [FLAGS] -- PROGRAM [ARGUMENTS]   a static program of yours, as root, on a machine of its own
       vm -list                            the kernels that can be had, and the suites

  go run ./test/vm -kernels 5.10,6.12 -- ./capture.test -test.v
  go run ./test/vm -kernels 6.1 -run 'TestClosedPort|TestHalfClose'
  go run ./test/vm -kernels newest -programs tcpdump,curl -- ./app
  go run ./test/vm -packages podman,crun,netavark -memory 3072 -files images.tar=/images.tar -- ./pods.test

A program finds a root file system of its own with /proc, /sys, bpffs, a pure cgroup2 hierarchy and lo, the kernel's
network modules (loaded when asked for), and the host's iptables, ip, tc, curl and sh. There is one processor and no way out.
The exit status is that of the program, of the first kernel where it was not 0 ("go run" turns it into 1); 1 if a test failed;
64 for a wrong command line; 69 if a kernel or QEMU cannot be had; 125 if a machine failed: a panic, an oops, a hang.

`

// Exit statuses beside those of package config.
const exitMachine = 125

// options are the flags.
type options struct {
	kernels  []string
	suites   []string
	run      string
	full     bool
	list     bool
	verbose  bool
	refresh  bool
	cache    string
	programs []string
	packages []string
	files    []string
	environ  []string
	memory   int
	jobs     int
	timeout  time.Duration
	table    string
	argv     []string // of the user's program
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	status := run(ctx, os.Args[1:], os.Stdout, os.Stderr, os.Getenv)
	stop()
	os.Exit(status)
}

// run runs one command line and returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer, getenv func(string) string) int {
	o, err := parse(args, stdout)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	status := 0
	if err == nil {
		status, err = o.do(ctx, &printer{out: stdout}, getenv)
	}
	if err != nil {
		fmt.Fprintf(stderr, "vm: %v\n", err)
		if hint := config.HintOf(err); hint != "" {
			fmt.Fprintf(stderr, "  hint: %s\n", hint)
		}
		return config.ExitOf(err)
	}
	return status
}

// usageError is an error of the command line.
func usageError(format string, args ...any) error {
	return &config.Fault{Err: fmt.Errorf(format, args...), Hint: "vm -h shows how it is used", Exit: config.ExitUsage}
}

func parse(args []string, stdout io.Writer) (o options, err error) {
	flags := flag.NewFlagSet("vm", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	list := func(to *[]string) func(string) error {
		return func(s string) error {
			*to = strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' })
			return nil
		}
	}
	o.kernels = []string{"5.10", "6.1", "6.12", debian.Newest}
	flags.Func("kernels", "series, separated by commas, or \"newest\"; with a ? behind it the run goes on without it (default 5.10,6.1,6.12,newest)", list(&o.kernels))
	flags.Func("suites", "only these suites, by their folder (default all; see -list)", list(&o.suites))
	flags.StringVar(&o.run, "run", "", "only tests that match this expression")
	flags.BoolVar(&o.full, "full", false, "the tests that -test.short leaves out, too")
	flags.BoolVar(&o.list, "list", false, "show the kernels and the suites, and run nothing")
	flags.BoolVar(&o.verbose, "v", false, "show every line of the tests and of the kernels")
	flags.BoolVar(&o.refresh, "refresh", false, "ask the archive for newer kernels, though it was asked within a day")
	flags.StringVar(&o.cache, "cache", "", "folder for kernels (default pillion/vm in the user's cache)")
	flags.Func("programs", "more programs of this host to take along", list(&o.programs))
	flags.Func("packages", "take the programs of these packages of Debian stable and of what they depend on, instead of this host's", list(&o.packages))
	flags.Func("files", "take along files, as HERE=THERE", list(&o.files))
	flags.Func("env", "variables for the tests, as NAME=VALUE", list(&o.environ))
	flags.IntVar(&o.memory, "memory", 1536, "of each machine, in MiB")
	flags.IntVar(&o.jobs, "jobs", 2, "machines at a time")
	flags.DurationVar(&o.timeout, "timeout", 0, "of each machine (default 8m, with -full 45m)")
	flags.StringVar(&o.table, "table", "", "compare the support table in this file with what was found, and correct it")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(stdout, usage)
		flags.SetOutput(stdout)
		flags.PrintDefaults()
		return o, err
	} else if err != nil {
		return o, usageError("%w", err)
	}
	o.argv = flags.Args()
	if len(o.argv) > 0 && !slices.Contains(args, "--") {
		return o, usageError("%q: a program is written behind --", o.argv[0])
	}
	if len(o.kernels) == 0 {
		return o, usageError("-kernels names none")
	}
	for _, k := range o.kernels {
		if !seriesName.MatchString(k) {
			return o, usageError("kernel %q: a series is written as 6.12, or newest", k)
		}
	}
	if len(o.argv) > 0 && (len(o.suites) > 0 || o.run != "" || o.full || o.table != "") {
		return o, usageError("-suites, -run, -full and -table are for the tests of this tree, not for a program")
	}
	if len(o.programs) > 0 && len(o.packages) > 0 {
		return o, usageError("-programs are of this host, -packages of Debian's: give one of them")
	}
	for _, f := range o.files {
		if here, there, ok := strings.Cut(f, "="); !ok || here == "" || !path.IsAbs(there) {
			return o, usageError("-files %q: write HERE=/THERE", f)
		}
	}
	if o.jobs < 1 || o.memory < 256 || o.timeout < 0 {
		return o, usageError("-jobs %d, -memory %d, -timeout %s: at least 1 machine, 256 MiB and a second", o.jobs, o.memory, o.timeout)
	}
	if o.timeout == 0 {
		o.timeout = 8 * time.Minute
		if o.full {
			o.timeout = 45 * time.Minute
		}
	}
	return o, nil
}

// cacheDir is where kernels are kept.
func (o options) cacheDir() (string, error) {
	if o.cache != "" {
		return filepath.Abs(o.cache)
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", &config.Fault{Err: err, Hint: "name a folder with -cache"}
	}
	return filepath.Join(dir, "pillion", "vm"), nil
}
