#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# generate.sh            regenerates the Go bindings and objects of bpf/ from the C
# generate.sh --check    tells whether what is committed is what the C makes; changes nothing
#
# Each clang makes other bytes. Debian 12's clang 14 is the one whose output is committed, so it is the only one used.

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

need_go
"$root/scripts/deps.sh" generate || warn "going on with what there is"
if ! have clang-14 || ! have llvm-strip-14; then
	[[ ${1:-} == --check ]] || fail "clang-14 and llvm-strip-14 are needed: Debian 12 has them (apt-get install clang-14 llvm-14 libbpf-dev)"
	warn "no clang-14 here: bpf/ was not compared"
	exit 0
fi

cd "$root"
if [[ ${1:-} != --check ]]; then
	go generate ./bpf
	exit 0
fi
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -a go.mod go.sum bpf "$copy"
rm -f "$copy"/bpf/*_bpfe[lb].*
(cd "$copy" && go generate ./bpf)
diff -r -q bpf "$copy/bpf" ||
	fail "bpf/: what is committed is not what the C makes. Run \"make generate\" and commit the result"
say "bpf/: what is committed is what clang 14 makes of the C"
