#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# soak.sh [DURATION]: the stress driver of test/e2e for ten minutes, or as long as is said, with a proxy built with -race.
# PILLION_STRESS_SEED repeats the choices of a run that failed.

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

is_root || fail "the stress driver makes network namespaces and loads BPF programs: run it as root (sudo make soak)"
need_go
export PILLION_REQUIRE_ROOT=1 PILLION_E2E_RACE=1 PILLION_STRESS_TIME="${1:-10m}"
cd "$root"
go test -count=1 -timeout 0 -v -run '^TestStress$' ./test/e2e
