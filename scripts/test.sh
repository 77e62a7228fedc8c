#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# All tests, with the race detector. As root, a test that cannot have the kernel that it needs fails; as anybody else it
# is skipped, and this says so.

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
say "go test -race ./..."
go test -race -vet=off -count=1 -timeout 9m "$@" ./...
note "took $((SECONDS - start)) s"
