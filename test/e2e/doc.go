// SPDX-License-Identifier: Apache-2.0

// Package e2e tests the pillion program as its users see it: the real binary, in real network namespaces and cgroups,
// between clients and servers that know nothing of it. It has no code but tests.
//
// What always holds: no test asserts a time (a test waits for a condition, and measured times are only logged); tests
// that run beside each other share no namespace and no cgroup; and init runs with exactly CAP_BPF and CAP_NET_ADMIN, the
// proxy with exactly CAP_NET_RAW, wherever a test does not say otherwise.
package e2e
