#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# vm.sh [FLAGS OF test/vm]: the tests that face the kernel, on the kernels that users have, each in a virtual machine; and the
# support table of README.md. The harness's own tests come first: a panic, an oops, a hang are failures that it reports.

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

need_go
"$root/scripts/deps.sh" vm
cd "$root"
start=$SECONDS
if [[ $# -eq 0 ]]; then
	say "the harness: what goes wrong in a machine is told"
	PILLION_VM_BOOT=1 go test -count=1 -run TestBadDays ./test/vm
fi
# Of test/e2e what kernels decide: all of it would take an hour on an emulated processor. -full and -run choose otherwise.
kernels_decide='^Test(AddressesAreTrueAtAllFourEnds|WaysToConnect|ProxyDown|Selection|SourcePortUsedAgain|SYNCookies|CleanRestores|KilledProxyIsSeenAsAReset|FilterAddresses|FilterCarriesAll)$'
if [[ $# -gt 0 ]]; then
	go run ./test/vm "$@"
else
	go run ./test/vm -suites redirect,redirect/cgroup,redirect/check,redirect/ebpf,redirect/iptables,proxy/listen,proxy/upstream,test/testnet -table README.md
	go run ./test/vm -suites test/e2e -run "$kernels_decide"
fi
note "took $((SECONDS - start)) s"
