#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# bench.sh [FLAGS]: test/bench with a binary of this tree. The tables go to standard output, as Markdown.

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

is_root || fail "the benchmark makes network namespaces and loads BPF programs: run it as root (sudo make bench)"
need_go
export PATH=$PATH:/usr/sbin:/sbin # Debian keeps some servers out of a user's PATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap : INT TERM # the benchmark cleans up, then this ends
"$root/scripts/build.sh" "$work/pillion"
cd "$root"
go build -o "$work/bench" ./test/bench
"$work/bench" -pillion "$work/pillion" "$@"
