#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# All tests. The units, and the proxies of test/e2e, are built with the race detector; not so deploy/inject, which has nothing
# to race, and the drivers of test/e2e and test/pod, which start thousands of programs. As root, a test that cannot have the kernel that it needs fails; as anybody
# else it is skipped, and this says so.

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

need_go
if is_root; then
	"$root/scripts/deps.sh" test
	export PILLION_REQUIRE_ROOT=1
else
	"$root/scripts/deps.sh" test || warn "going on without them: tests that need them fail or are skipped"
	warn "not root: the tests that need the kernel (most of test/) are skipped; sudo make test runs them"
fi
cd "$root"
# Debian keeps some servers out of a user's PATH.
export PATH=$PATH:/usr/sbin:/sbin
start=$SECONDS
say "go vet ./..."
go vet ./...
# Never from the cache: most tests ask the kernel and other programs, which the cache knows nothing of.
plain=(./deploy/inject ./test/e2e ./test/pod)
mapfile -t raced < <(comm -23 <(go list ./... | sort) <(go list "${plain[@]}" | sort))
export PILLION_E2E_RACE=1
failed=
say "go test -race ./... but ${plain[*]}"
go test -race -vet=off -count=1 -timeout 9m "$@" "${raced[@]}" || failed=1
say "go test ${plain[*]}"
go test -vet=off -count=1 -timeout 14m "$@" "${plain[@]}" || failed=1
note "took $((SECONDS - start)) s"
[[ -z $failed ]]
