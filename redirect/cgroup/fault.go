// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"errors"
	"fmt"
	"strings"

	"github.com/pillionproxy/pillion/config"
)

// seen adds to a failed search what there was to see, and what to change.
func seen(err error) error {
	v2, v1, _ := readMounts()
	own, oerr := Own()
	if oerr != nil {
		own = "none"
	}
	f := &config.Fault{
		Err:  fmt.Errorf("%w (cgroup2 mounts: %s; version 1 mounts: %d; own cgroup: %s)", err, list(v2), len(v1), own),
		Exit: config.ExitUnavailable,
	}
	// The error may tell by itself what to do, and the exit code.
	if f.Hint = config.HintOf(err); f.Hint != "" {
		f.Exit = config.ExitOf(err)
	} else {
		f.Hint = remedy(err, len(v2), len(v1))
	}
	return f
}

const (
	others  = "take --backend tproxy or redirect, which need no cgroup"
	unified = "boot the node with systemd.unified_cgroup_hierarchy=1 and let its container runtime use cgroup2; or " + others
	hostDir = "mount the host's cgroup2 file system (in a pod: a hostPath volume of /sys/fs/cgroup)"
)

// remedy is what is missing, and what to change, where so many mounts of each version are seen.
func remedy(err error, v2, v1 int) string {
	var above noPodError
	noPod := errors.As(err, &above)
	switch path := string(above); {
	case errors.Is(err, errNoCgroup2):
		return "no cgroup2 hierarchy is there: " + unified
	case noPod && v1 > 0 && (path == "/" || strings.HasSuffix(path, ".service")):
		return "this container is in version 1 cgroups alone: " + unified
	case noPod && strings.Contains(path, ".slice:"):
		// A runtime that uses cgroupfs takes slice:prefix:id, by which a kubelet that uses systemd names a container, for one
		// directory. Those of all pods lie side by side.
		return "pods have no cgroup, for the container runtime does not use the kubelet's cgroup driver: give both the same (containerd: SystemdCgroup = true); or " + others
	case noPod:
		return "no cgroup above this process has the name of a kubelet's or podman's pod: give the directory with --cgroup; or " + others
	case v2 == 0 && v1 > 0:
		return "only version 1 cgroups are mounted: " + hostDir + ", or give CAP_SYS_ADMIN; or " + unified
	case v2 == 0:
		return "no cgroup2 is mounted: " + hostDir + ", or give CAP_SYS_ADMIN"
	default:
		return "the cgroup2 that is mounted does not show what is needed: " + hostDir + ", or give the directory with --cgroup"
	}
}

func list(mounts []Mount) string {
	if len(mounts) == 0 {
		return "none"
	}
	var points []string
	for _, m := range mounts {
		points = append(points, m.Point)
	}
	return strings.Join(points, ", ")
}
