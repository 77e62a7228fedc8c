// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/cgroup"
	"github.com/pillionproxy/pillion/redirect/ebpf"
)

// ProbeVerb is the hidden verb of the program under which it runs RunProbe.
const ProbeVerb = "__probe"

// RunProbe is the other end of verify: it reads an ebpf.Probe, runs it, and writes the checks, as JSON.
func RunProbe(ctx context.Context, in io.Reader, out io.Writer) error {
	var p ebpf.Probe
	if err := json.NewDecoder(in).Decode(&p); err != nil {
		return fmt.Errorf("read the probe: %w", err)
	}
	checks, err := p.Run(ctx)
	if err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(checks)
}

// verify runs a probe inside the cgroup, and one in each that is excluded. Its error names every check that failed. The
// caller holds the redirect.Lock.
func verify(ctx context.Context, t target, policy config.Capture) ([]redirect.Check, error) {
	p := ebpf.Probe{Shared: policy.Shared, ProxyUID: policy.ProxyUID, Selection: policy.Selection}
	checks, err := probe(ctx, t, p)
	if err != nil {
		return nil, fmt.Errorf("verify the capture: %w", err)
	}
	for _, path := range policy.Selection.ExcludeCgroups {
		more, err := probeExcluded(ctx, path, p)
		if err != nil {
			return nil, fmt.Errorf("verify the capture: %w", err)
		}
		checks = append(checks, more...)
	}
	return checks, failed(checks)
}

// failed is the error of checks that failed, which it names; nil if there are none.
func failed(checks []redirect.Check) error {
	var list []string
	for _, c := range checks {
		if !c.OK {
			list = append(list, c.String())
		}
	}
	if len(list) == 0 {
		return nil
	}
	return &config.Fault{
		Err:  fmt.Errorf("verify the capture: %s", strings.Join(list, "; ")),
		Hint: "`pillion status` shows the parts; packet filters and other users of tc or of the mark bits are the usual causes",
	}
}

// probeExcluded tries what the processes of an excluded cgroup do.
func probeExcluded(ctx context.Context, path string, p ebpf.Probe) ([]redirect.Check, error) {
	dir, err := cgroup.Open(path)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	p.Cgroup = path
	checks, err := probe(ctx, target{Dir: dir}, p)
	return slices.DeleteFunc(checks, func(c redirect.Check) bool { return c.Rule == "" }), err
}

// probe starts this program again, as a process of the captured cgroup.
func probe(ctx context.Context, t target, p ebpf.Probe) ([]redirect.Check, error) {
	input, err := json.Marshal(p)
	if err != nil {
		return nil, err
	}
	var out, messages bytes.Buffer
	cmd := exec.CommandContext(ctx, "/proc/self/exe", ProbeVerb)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(input), &out, &messages
	if !t.inside || p.Cgroup == "" && inExcluded(p.Selection.ExcludeCgroups) {
		leaf, err := newLeaf(t.Dir)
		if err != nil {
			return nil, err
		}
		defer leaf.remove()
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(leaf.dir.Fd())}
	}
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("run the probe in cgroup %s: %w: %s", t.Path, err, strings.TrimSpace(messages.String()))
	}
	var checks []redirect.Check
	if err := json.Unmarshal(out.Bytes(), &checks); err != nil {
		return nil, fmt.Errorf("read the probe's answer: %w", err)
	}
	return checks, nil
}

// inExcluded reports whether this process is in an excluded cgroup.
func inExcluded(paths []string) bool {
	own, err := cgroup.OwnDir()
	if err != nil {
		return false
	}
	defer own.Close()
	return slices.ContainsFunc(paths, func(path string) bool {
		return own.Path == path || isBelow(own, &cgroup.Dir{Path: path})
	})
}

// leaf is a cgroup of our own for one process: in cgroup2 a process may not live beside child cgroups that have
// controllers.
type leaf struct{ dir *cgroup.Dir }

func newLeaf(parent *cgroup.Dir) (leaf, error) {
	path := filepath.Join(parent.Path, fmt.Sprintf("pillion-probe-%d", os.Getpid()))
	if err := os.Mkdir(path, 0o755); err != nil && !os.IsExist(err) {
		return leaf{}, &config.Fault{
			Err:  fmt.Errorf("make a cgroup for the probe: %w", err),
			Hint: "the cgroup2 file system must be writable for this proof; --no-verify leaves it out",
		}
	}
	dir, err := cgroup.Open(path)
	if err != nil {
		os.Remove(path)
		return leaf{}, err
	}
	return leaf{dir}, nil
}

func (l leaf) remove() {
	l.dir.Close()
	os.Remove(l.dir.Path)
}
