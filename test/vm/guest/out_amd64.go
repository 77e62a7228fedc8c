// SPDX-License-Identifier: Apache-2.0

package main

// out writes a byte to an I/O port. The process needs iopl(3).
//
//go:noescape
func out(port uint16, value byte)
