// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/pillionproxy/pillion/config"
)

const module = "github.com/pillionproxy/pillion"

// suite is the tests of one package, compiled.
type suite struct {
	name   string // path of the package in the module
	dir    string // of its source
	binary string // empty until it is built
}

// facing are packages by which a package speaks to the kernel. A suite is every package with tests that imports one of
// them, or whose tests do: one that is added later is found by itself.
var facing = []string{"golang.org/x/sys/unix", "github.com/cilium/ebpf", "github.com/vishvananda/netlink", module + "/test/testnet"}

// findSuites lists the suites of the module.
func findSuites(ctx context.Context) ([]suite, error) {
	const format = `{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}}|{{.Dir}}|{{join .Imports " "}} {{join .TestImports " "}} {{join .XTestImports " "}}{{end}}`
	out, err := goTool(ctx, "list", "-f", format, module+"/...")
	if err != nil {
		return nil, err
	}
	return parseSuites(string(out)), nil
}

// parseSuites reads lines of IMPORT PATH|FOLDER|IMPORTS. The harness itself is no suite.
func parseSuites(list string) (suites []suite) {
	for line := range strings.Lines(list) {
		fields := strings.SplitN(strings.TrimSpace(line), "|", 3)
		if len(fields) != 3 {
			continue
		}
		name := strings.TrimPrefix(strings.TrimPrefix(fields[0], module), "/")
		if name == "test/vm" || strings.HasPrefix(name, "test/vm/") {
			continue
		}
		if slices.ContainsFunc(strings.Fields(fields[2]), func(p string) bool { return slices.Contains(facing, p) }) {
			suites = append(suites, suite{name: name, dir: fields[1]})
		}
	}
	return suites
}

// build compiles what the machines run, to a folder: the guest's first process, pillion, and the suites.
func build(ctx context.Context, dir string, suites []suite) (guest, pillion string, err error) {
	guest, pillion = filepath.Join(dir, "guest"), filepath.Join(dir, "pillion")
	flags := []string{"-trimpath", "-ldflags", "-s -w"}
	jobs := [][]string{append([]string{"build", "-o", guest}, append(flags, module+"/test/vm/guest")...)}
	if len(suites) > 0 {
		jobs = append(jobs, append([]string{"build", "-o", pillion}, append(flags, module+"/cmd/pillion")...))
	}
	for i, s := range suites {
		suites[i].binary = filepath.Join(dir, strings.ReplaceAll(s.name, "/", "-")+".test")
		jobs = append(jobs, append([]string{"test", "-c", "-o", suites[i].binary}, append(flags, module+"/"+s.name)...))
	}
	errs := make([]error, len(jobs))
	free := make(chan struct{}, runtime.NumCPU())
	var wg sync.WaitGroup
	for i, args := range jobs {
		wg.Go(func() {
			free <- struct{}{}
			defer func() { <-free }()
			_, errs[i] = goTool(ctx, args...)
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return "", "", err
		}
	}
	return guest, pillion, nil
}

// goTool runs go for the machines: amd64, and static.
func goTool(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=-buildvcs=false", "GOWORK=off")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, &config.Fault{
			Err:  fmt.Errorf("go %s: %w\n%s", args[0], err, bytes.TrimSpace(stderr.Bytes())),
			Hint: "run it inside the source tree, with Go on PATH",
		}
	}
	return out, nil
}

// guestDir is where a suite finds itself in the guest, as in the tree.
func (s suite) guestDir() string { return path.Join("/tests", s.name) }
