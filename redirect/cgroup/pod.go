// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
)

// place is where this process's cgroup is in a hierarchy.
type place struct {
	path  string // names, from the top of what is seen of the hierarchy
	whole bool   // that top is the hierarchy's own: no other way can tell more
	open  func(above string) (*Dir, error)
	how   string
}

// FindPod opens the cgroup of the pod that this container is part of, and says how it was found. The pod is the innermost
// one that the names of the cgroups above tell. The ways to those names are tried in this order:
//
//  1. the path in /proc/self/cgroup, where the host's cgroup namespace is ours (containerd and CRI-O give it to
//     privileged containers);
//  2. the host's hierarchy mounted somewhere: the directory with the inode number of our own cgroup;
//  3. the kernel: a program attached to our own cgroup reads the ids of the cgroups above it, which are then opened by
//     their ids. It needs CAP_DAC_READ_SEARCH and a seccomp profile that allows open_by_handle_at(2).
//
// Where the names tell no pod, there is none: whatever else is above may hold containers of others. Its errors are faults
// that say what was seen and what to change.
func FindPod() (dir *Dir, how string, err error) {
	if dir, how, err = findPod(); err != nil {
		return nil, "", seen(err)
	}
	return dir, how, nil
}

func findPod() (*Dir, string, error) {
	own, err := Own()
	if err != nil {
		return nil, "", err
	}
	mounts, err := Mounts()
	if err != nil {
		return nil, "", err
	}
	named := ownPlace(own, mounts)
	dir, err := named.pod()
	if err == nil || named.whole {
		return dir, named.how, err
	}
	self, serr := ownDir()
	if serr != nil {
		if errors.As(err, new(noPodError)) {
			err = serr // else the name is known, and why it was not opened tells more
		}
		return nil, "", err
	}
	defer self.Close()
	if self.ID == rootID {
		return nil, "", noPodError("/")
	}
	for _, m := range mounts {
		under, ok := placeUnder(m, self)
		if !ok {
			continue
		}
		if dir, err = under.pod(); err == nil || under.whole {
			return dir, under.how, err
		}
	}
	told, err := toldByKernel(self)
	if err != nil {
		return nil, "", fmt.Errorf("no mount shows the cgroups above this container, and the kernel did not tell them: %w", err)
	}
	dir, err = told.pod()
	return dir, told.how, err
}

// rootID is the inode number of the root of a cgroup2 hierarchy.
const rootID = 1

// noPodError says that no name above a cgroup, or its own, is one of a pod.
type noPodError string

func (e noPodError) Error() string { return fmt.Sprintf("cgroup %s has no pod above it", string(e)) }

// pod opens the innermost pod on the way to a place. The error is a noPodError if there is none.
func (p place) pod() (*Dir, error) {
	pod := podAbove(p.path)
	if pod == "" {
		return nil, noPodError(p.path)
	}
	dir, err := p.open(pod)
	if err != nil {
		return nil, fmt.Errorf("the pod's cgroup %s: %w", pod, err)
	}
	return dir, nil
}

// ownPlace is what /proc/self/cgroup says.
func ownPlace(own string, mounts []Mount) place {
	const initialCgroupNS = "cgroup:[4026531835]" // PROC_CGROUP_INIT_INO in include/linux/proc_ns.h
	ns, err := os.Readlink("/proc/self/ns/cgroup")
	return place{
		path:  own,
		whole: err == nil && ns == initialCgroupNS && own != "/",
		open:  func(above string) (*Dir, error) { return openNamed(mounts, above) },
		how:   "own cgroup namespace path " + own,
	}
}

// placeUnder is where our own cgroup is under a mount; false if it is not.
func placeUnder(m Mount, self *Dir) (place, bool) {
	path := m.find(hasID(self.ID))
	if path == "" {
		return place{}, false
	}
	point := strings.TrimSuffix(m.Point, "/")
	info, err := os.Stat(m.Point)
	return place{
		path:  strings.TrimPrefix(path, point),
		whole: err == nil && info.Sys().(*syscall.Stat_t).Ino == rootID,
		open:  func(above string) (*Dir, error) { return open(point + above) },
		how:   "inode of the own cgroup under a mounted host hierarchy",
	}, true
}

// openNamed opens a cgroup by its path in our cgroup namespace.
func openNamed(mounts []Mount, name string) (*Dir, error) {
	for _, m := range mounts {
		if path, ok := m.path(name); ok {
			if d, err := open(path); err == nil {
				return d, nil
			}
		}
	}
	return openUnmounted(name)
}
