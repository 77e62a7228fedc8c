#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# tool.sh NAME: builds a development tool, at the version pinned here, into the user's cache unless it is there already,
# and prints its path. The tools stay out of go.mod: golangci-lint alone would bring two hundred modules.

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

case ${1:-} in
golangci-lint) module=github.com/golangci/golangci-lint/v2/cmd/golangci-lint version=v2.15.0 ;;
gofumpt) module=mvdan.cc/gofumpt version=v0.12.0 ;;
cyclonedx-gomod) module=github.com/CycloneDX/cyclonedx-gomod/cmd/cyclonedx-gomod version=v1.10.0 ;;
*) fail "tool.sh: unknown tool \"${1:-}\"; there are: golangci-lint gofumpt cyclonedx-gomod" ;;
esac

need_go
tool=$(cache)/bin/$1-$version
# A tool that was built by an older Go than the tree is checked with cannot read it.
stamp=$tool.go
if [[ ! -x $tool || $(cat "$stamp" 2>/dev/null) != $(go env GOVERSION) ]]; then
	say "building $1 $version (once; kept in $(cache))" >&2
	mkdir -p "$(cache)/bin"
	dir=$(mktemp -d "$(cache)/build.XXXXXX")
	trap 'rm -rf "$dir"' EXIT
	# From outside the tree, so that the tree's go.mod has no say.
	(cd "$dir" && GOBIN=$dir GOFLAGS='' CGO_ENABLED=0 go install "$module@$version") >"$dir/log" 2>&1 ||
		fail "building $1 failed:
$(grep -v '^go: downloading' "$dir/log")"
	mv "$dir/$1" "$tool"
	go env GOVERSION >"$stamp"
fi
printf '%s\n' "$tool"
