// SPDX-License-Identifier: Apache-2.0

// Package tree holds the tests that police the source tree: which package may import which, licence lines, package
// comments, file lengths, the list of linked packages, and that what the README tells to type exists.
//
// What always holds: its tests read the tree and run `go list`; they need no kernel, no root and no network, and write
// nothing but, with -update, the files in testdata.
package tree
