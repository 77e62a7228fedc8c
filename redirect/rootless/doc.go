// SPDX-License-Identifier: Apache-2.0

// Package rootless captures one command without any right on the host: in a user and a network namespace of its own, in which
// every destination is local. Its packets never leave the loopback device there; a transparent listener takes them, with the
// addresses that the command meant, and the proxy, which stays outside, dials as its user.
//
// What always holds:
//   - The namespace has the host's addresses, so that the command sees the same own address for each destination as without
//     it, and no address is ever rewritten.
//   - What the host has no route to is unreachable in the namespace too.
//   - What is not carried is refused at once, or never sent: nothing passes by, for there is no way out.
//   - Nothing on the host is changed. The namespace ends with its last process.
package rootless
