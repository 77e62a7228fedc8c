// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"fmt"
	"strings"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/cgroup"
	"github.com/pillionproxy/pillion/redirect/ebpf"
)

// target is the cgroup to capture, and whether this process is in it.
type target struct {
	*cgroup.Dir
	foundBy string
	inside  bool
}

func findTarget(path string) (target, error) {
	if path == "" {
		dir, how, err := cgroup.FindPod()
		return target{dir, how, true}, err
	}
	dir, err := cgroup.Open(path)
	if err != nil {
		return target{}, err
	}
	return target{dir, "--cgroup", isInside(dir)}, nil
}

// isInside reports whether this process is in the cgroup or below it.
func isInside(dir *cgroup.Dir) bool {
	own, err := cgroup.OwnDir()
	if err != nil {
		return false
	}
	defer own.Close()
	return own.ID == dir.ID || isBelow(own, dir)
}

func isBelow(dir, other *cgroup.Dir) bool {
	return strings.HasPrefix(dir.Path, strings.TrimSuffix(other.Path, "/")+"/")
}

func planFor(policy config.Capture, dir *cgroup.Dir, lifetime redirect.Lifetime) (redirect.Plan, error) {
	if err := ebpf.Supports(policy); err != nil {
		return redirect.Plan{}, err
	}
	host, err := redirect.ReadHost(dir.ID)
	if err != nil {
		return redirect.Plan{}, err
	}
	if host.ExcludedCgroups, err = excludedCgroups(dir, policy.Selection.ExcludeCgroups); err != nil {
		return redirect.Plan{}, err
	}
	policy.Cgroup = dir.Path
	return ebpf.Plan(policy, host, lifetime), nil
}

// excludedCgroups are the ids of cgroups below the captured one.
func excludedCgroups(captured *cgroup.Dir, paths []string) ([]uint64, error) {
	var ids []uint64
	for _, path := range paths {
		dir, err := cgroup.Open(path)
		if err != nil {
			return nil, err
		}
		ids = append(ids, dir.ID)
		below := isBelow(dir, captured)
		if err := dir.Close(); err != nil {
			return nil, err
		}
		if !below {
			return nil, &config.Fault{
				Err:  fmt.Errorf("--exclude-cgroups %s: is not below the captured cgroup %s", path, captured.Path),
				Hint: "what lies outside of it is not captured anyway",
				Exit: config.ExitConfig,
			}
		}
	}
	return ids, nil
}
