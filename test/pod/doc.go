// SPDX-License-Identifier: Apache-2.0

// Package pod tests the capture in real pods: podman's `kube play` runs what `pillion inject` renders for pods that know
// nothing of it, with images that are built FROM scratch of Debian's own programs and of `make image`.
//
// A node is a network namespace of the test in which podman makes its bridge and the pods; its store is in a folder of the
// test. What always holds: when a test ends, its pods, networks, mounts, processes and cgroups are gone, and the node is as
// it was before them, which each test compares.
package pod
