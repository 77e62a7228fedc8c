// SPDX-License-Identifier: Apache-2.0

// Package lifecycle is what a proxy does at its start and its end: it gives up what it may do but need not, learns how
// many connections it can carry, and drains.
//
// What always holds: privileges only ever shrink, for all threads of the process at once; and a drain ends, because what
// does not end by itself in time is aborted.
package lifecycle
