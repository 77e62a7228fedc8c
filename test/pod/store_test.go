// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// store is podman's state, in a folder of its own: images, containers, networks.
type store struct {
	dir     string
	parents []string // cgroups of podman's that were not there before
}

// newStore makes the folder and podman's configuration.
func newStore() (*store, error) {
	dir, err := os.MkdirTemp("", "pillion-pod-")
	if err != nil {
		return nil, err
	}
	s := &store{dir: dir}
	if err := os.Mkdir(filepath.Join(dir, "work"), 0o755); err != nil {
		return nil, err
	}
	for name, content := range map[string]string{
		"storage.conf":    "[storage]\ndriver = \"overlay\"\ngraphroot = \"DIR/graph\"\nrunroot = \"DIR/run\"\n",
		"registries.conf": "",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(strings.ReplaceAll(content, "DIR", dir)), 0o644); err != nil {
			return nil, err
		}
	}
	s.parents = slices.DeleteFunc(parents(), isDir)
	return s, s.configure("networks")
}

// configure writes a configuration with networks of its own, by the name of their folder.
func (s *store) configure(networks string) error {
	if err := os.MkdirAll(filepath.Join(s.dir, networks), 0o755); err != nil {
		return err
	}
	text, err := os.ReadFile("testdata/containers.conf")
	if err != nil {
		return err
	}
	text = []byte(strings.NewReplacer("DIR", s.dir, "NETWORKS", networks, "RUNTIME", ociRuntime()).Replace(string(text)))
	return os.WriteFile(filepath.Join(s.dir, networks+".conf"), text, 0o644)
}

// ociRuntime is what podman starts containers with: runc, which takes a hybrid hierarchy of cgroups, or else crun.
func ociRuntime() string {
	if _, err := exec.LookPath("runc"); err != nil {
		return "crun"
	}
	return "runc"
}

// parents are the cgroups in which podman puts pods and its monitors, in every hierarchy of either version.
func parents() (list []string) {
	b, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(b)) {
		left, right, _ := strings.Cut(line, " - ")
		if strings.HasPrefix(right, "cgroup") {
			mount := strings.Fields(left)[4]
			list = append(list, filepath.Join(mount, "libpod_parent"), filepath.Join(mount, "conmon"))
		}
	}
	return list
}

// environ makes podman and its kin use the store, and some networks.
func (s *store) environ(networks string) []string {
	return append(os.Environ(),
		"CONTAINERS_CONF="+filepath.Join(s.dir, networks+".conf"),
		"CONTAINERS_STORAGE_CONF="+filepath.Join(s.dir, "storage.conf"),
		"CONTAINERS_REGISTRIES_CONF="+filepath.Join(s.dir, "registries.conf"),
	)
}

// remove takes everything away. Its error names what is left.
func (s *store) remove() error {
	var errs []error
	if _, err := s.podman("pod", "rm", "--all", "--force", "--time=0"); err != nil {
		errs = append(errs, err)
	}
	for _, point := range s.mounts() {
		if point != filepath.Join(s.dir, "graph/overlay") { // which podman keeps
			errs = append(errs, fmt.Errorf("%s is still mounted", point))
		}
		if err := unix.Unmount(point, unix.MNT_DETACH); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", point, err))
		}
	}
	for _, dir := range s.parents {
		// podman 4.3 leaves the empty cgroups of its pods in the hierarchies without controllers; the kubelet does not. One
		// with a process in it cannot be removed.
		below, _ := filepath.Glob(filepath.Join(dir, "*"))
		for _, d := range append(slices.DeleteFunc(below, func(b string) bool { return !isDir(b) }), dir) {
			if err := os.Remove(d); err != nil && !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(append(errs, os.RemoveAll(s.dir))...)
}

// mounts are those below the store, the latest first.
func (s *store) mounts() (points []string) {
	b, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(b)) {
		if point := strings.Fields(line)[4]; strings.HasPrefix(point, s.dir+"/") {
			points = append([]string{point}, points...)
		}
	}
	return points
}
