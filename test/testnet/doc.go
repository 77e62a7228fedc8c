// SPDX-License-Identifier: Apache-2.0

// Package testnet builds what a test of the capture needs, in a few readable calls: network namespaces joined by veth
// pairs, servers and clients in them, cgroups, and processes that live in both.
//
//	n := testnet.New(t)
//	pod, ext := n.Namespace("pod"), n.Namespace("ext")
//	testnet.Link(pod, "eth0", ext, "v0")
//	pod.Addr("eth0", "10.77.0.2/24", "fd77::2/64")
//	ext.Addr("v0", "10.77.0.1/24", "fd77::1/64")
//	pod.DefaultRoute("10.77.0.1", "fd77::1")
//	cg := n.Cgroup("pod")
//	app := pod.Agent(cg.Child("app"))           // a process inside namespace and cgroup
//	conn, err := app.Dial(testnet.Dial{To: "10.77.0.1:80"})
//
// What always holds: whatever a test makes goes when the test ends, also when it fails, panics, or when a process of it
// was killed; names carry the prefix "plt-", the pid of the test and a counter, so that tests run beside each other; what
// a killed test left behind is swept by the next one, and only that (prefix and dead pid). Processes are ended by their
// pid or their cgroup, never by a name. No external program is used, and /sys is never mounted again: a thread enters a
// namespace by setns alone, so that the cgroup tree stays in sight.
//
// Everything needs root. Without it New skips the test, or fails it when PILLION_REQUIRE_ROOT=1.
package testnet
