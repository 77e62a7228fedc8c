// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"path"
	"regexp"
	"strings"
)

// podAbove is the path of the innermost pod that a cgroup is in, by how kubelets and podman lay out their cgroups; "" where
// no name says that there is one. The parent of a container is no pod by itself: in other layouts it holds containers of
// others too (/docker, /system.slice).
func podAbove(cgroup string) string {
	child := ""
	for p := path.Clean(cgroup); p != "/" && p != "."; p = path.Dir(p) {
		if isPod(p, child) {
			return p
		}
		child = path.Base(p)
	}
	return ""
}

// What a kubelet makes below its --cgroup-root (pkg/kubelet/cm of Kubernetes), by its driver:
//
//	cgroupfs  kubepods[/burstable|/besteffort]/pod<uid>
//	systemd   each level repeats the one above: [kubelet-]kubepods[-burstable]-pod<uid, its dashes as underscores>.slice
//
// A uid is 36 characters of the API server, 32 of a pod from a file or URL, or whatever such a file says. What the runtime
// makes below is its own affair.
var systemdPod = regexp.MustCompile(`^((?:.+-)?kubepods(?:-burstable|-besteffort)?)-pod[^-]+\.slice$`)

// What podman makes: libpod_parent/<id> by cgroupfs, or <parent>/<id> with --cgroup-parent; [machine-]libpod_pod_<id>.slice
// by systemd.
var (
	podmanPod = regexp.MustCompile(`^(?:.+-)?libpod_pod_[0-9a-f]{64}(?:\.slice)?$`)
	podmanID  = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

// isPod reports whether the cgroup p is a pod; child is the name of the one below it in which we are, "" if there is none.
func isPod(p, child string) bool {
	base, parent := path.Base(p), path.Dir(p)
	if m := systemdPod.FindStringSubmatch(base); m != nil {
		return parent == "/" || path.Base(parent) == m[1]+".slice" // "/" if only this part of the hierarchy is seen
	}
	if podmanPod.MatchString(base) {
		return true
	}
	if podmanID.MatchString(base) {
		return path.Base(parent) == "libpod_parent" || strings.HasPrefix(child, "libpod-")
	}
	if qos := path.Base(parent); qos == "burstable" || qos == "besteffort" {
		parent = path.Dir(parent)
	}
	return len(base) > len("pod") && strings.HasPrefix(base, "pod") && path.Base(parent) == "kubepods"
}
