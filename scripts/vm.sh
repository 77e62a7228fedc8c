#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# vm.sh [FLAGS OF test/vm]: the tests that face the kernel, on the kernels that users have, each in a virtual machine; and the
# support table of README.md. The harness's own tests come first: a panic, an oops, a hang are failures that it reports.

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

need_go
"$root/scripts/deps.sh" vm
cd "$root"
if [[ $# -gt 0 ]]; then
	exec go run ./test/vm "$@"
fi
start=$SECONDS
say "the harness: what goes wrong in a machine is told"
PILLION_VM_BOOT=1 go test -count=1 -run TestBadDays ./test/vm
go run ./test/vm -table README.md
note "took $((SECONDS - start)) s"
