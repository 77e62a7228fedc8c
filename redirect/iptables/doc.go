// SPDX-License-Identifier: Apache-2.0

// Package iptables holds the backends for hosts without usable BPF or cgroup2: TProxy, which never rewrites an address
// either, and Redirect, for a proxy that may hold no capability at all. Their scope is the network namespace.
//
// What always holds: rules live in chains of our own, each with its reason as a comment; a family is changed in one
// transaction (iptables-restore), so that there is no moment without capture when another policy takes the place of the
// present one; what was there before stands in the comments of our own rules, where Remove finds it; and what a backend
// cannot honour is refused by name before anything is changed.
package iptables
