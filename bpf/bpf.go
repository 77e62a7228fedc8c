// SPDX-License-Identifier: Apache-2.0

// Package bpf is the kernel half of the capture: the C programs, the structs and names that they share with Go, and the
// generated bindings. It loads and attaches nothing; package redirect/ebpf does.
//
// What always holds: the bindings are those that `make generate` makes of the C files beside them, and one object,
// Capture, serves every kernel from 5.10 on with CAP_BPF and CAP_NET_ADMIN. Fast is the same with one faster cure, for
// those who may read kernel memory; its settings and names are Capture's.
package bpf

//go:generate go tool bpf2go -tags linux -target bpfel,bpfeb -cc clang-14 -strip llvm-strip-14 -no-global-types -type settings -type counter -type cure -type failure_mode -type maker -type select_kind -type select_flag Capture capture.bpf.c -- -O2 -g -Wall -Werror -mcpu=v2 -I/usr/include/x86_64-linux-gnu
//go:generate go tool bpf2go -tags linux -target bpfel,bpfeb -cc clang-14 -strip llvm-strip-14 -no-global-types Fast fast.bpf.c -- -O2 -g -Wall -Werror -mcpu=v2 -I/usr/include/x86_64-linux-gnu
//go:generate go tool bpf2go -tags linux -target bpfel,bpfeb -cc clang-14 -strip llvm-strip-14 -no-global-types -type probe Probe probe.bpf.c -- -O2 -g -Wall -Werror -mcpu=v2 -I/usr/include/x86_64-linux-gnu
