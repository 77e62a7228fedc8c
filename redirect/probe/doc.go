// SPDX-License-Identifier: Apache-2.0

// Package probe makes the connections by which a backend proves its capture, and sees where they arrive.
//
// What always holds: nothing of it leaves this host; where no proxy runs its port is borrowed such that others wait as if
// nobody listened; and both answers, captured or not, are a connection that arrives, not a silence.
package probe
