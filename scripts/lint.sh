#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# golangci-lint (.golangci.yml) over the Go, its formatters included, and shellcheck over the shell.

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

need_go
"$root/scripts/deps.sh" lint || warn "going on without them"
lint=$("$root/scripts/tool.sh" golangci-lint)
cd "$root"
"$lint" run ./...
if have shellcheck; then
	shellcheck --external-sources --source-path=SCRIPTDIR scripts/*.sh .ci/run
	say "shellcheck: no issues."
else
	warn "shellcheck is not installed: the scripts were not checked"
fi
