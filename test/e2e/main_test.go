// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"testing"

	"github.com/pillionproxy/pillion/test/testnet"
)

// pillionPath is the program under test, carrierPath the same for what carries connections: built with -race where the tests
// are. The commands that end at once take twice as long so, and there are thousands of them. selfPath is a copy of this test
// binary that every user can execute. Written by TestMain alone.
var pillionPath, carrierPath, selfPath string

// kernelDecides are the tests that run under -short, as in the machines of test/vm: each asks of the kernel something that
// no other of them does. All of the others would take an hour on an emulated processor.
var kernelDecides = []string{
	"TestAddressesAreTrueAtAllFourEnds", "TestFilterAddresses", "TestKilledProxyIsSeenAsAReset", "TestRootlessAddresses", "TestRootlessDatagrams", "TestSYNCookies",
	"TestSourcePortUsedAgain", "TestWaysToConnect",
}

func TestMain(m *testing.M) {
	testnet.Short = kernelDecides
	heedSignals()
	forkedChild()
	serveAsChild()
	testnet.AgentMain(stormOp, udpOp, forkOp, becomeOp, connectsOp, downloadOp, uploadOp, victimServeOp, victimDialOp, tryOp)
	os.Exit(buildAndRun(m))
}

// heedSignals lets the programs that are started here have signals that this process ignores, as under nohup: Go hands SIGHUP and
// SIGINT on as they were, unless they are asked for.
func heedSignals() {
	for _, s := range []os.Signal{syscall.SIGHUP, syscall.SIGINT} {
		if signal.Ignored(s) {
			signal.Notify(make(chan os.Signal, 1), s)
		}
	}
}

func buildAndRun(m *testing.M) int {
	if os.Getenv("GORACE") == "" { // else each program that is built with -race sleeps a second when it ends
		os.Setenv("GORACE", "atexit_sleep_ms=20")
	}
	dir, err := os.MkdirTemp("", "pillion-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil { // the proxy's user must reach the program
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	pillionPath, selfPath = filepath.Join(dir, "pillion"), filepath.Join(dir, "e2e.test")
	carrierPath = pillionPath
	if err := copyProgram("/proc/self/exe", selfPath); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if built := os.Getenv("PILLION_TEST_BINARY"); built != "" { // where there is no Go, as in the machines of test/vm
		err = copyProgram(built, pillionPath)
	} else {
		err = compile(pillionPath)
		if err == nil && (underRace() || os.Getenv("PILLION_E2E_RACE") == "1") {
			carrierPath = filepath.Join(dir, "pillion-race")
			err = compile(carrierPath, "-race")
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return testnet.Main(m)
}

func compile(path string, flags ...string) error {
	build := exec.Command("go", append(append([]string{"build", "-o", path}, flags...), "github.com/pillionproxy/pillion/cmd/pillion")...)
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w\n%s", build.Args, err, out)
	}
	return nil
}

func copyProgram(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// underRace reports whether the tests themselves were built with -race.
func underRace() bool {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return false
	}
	for _, s := range info.Settings {
		if s.Key == "-race" {
			return s.Value == "true"
		}
	}
	return false
}
