#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# What the other scripts share. Sourced, never run.

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The version is stamped by scripts/build.sh. Go's own stamp fails the build where git distrusts the owner of the tree (su).
export GOFLAGS="${GOFLAGS:-} -buildvcs=false"

# Colours, only where a person looks.
bold='' dim='' red='' green='' yellow='' plain=''
if [[ -t 1 && -z ${NO_COLOR:-} ]]; then
	bold=$'\e[1m' dim=$'\e[2m' red=$'\e[31m' green=$'\e[32m' yellow=$'\e[33m' plain=$'\e[0m'
fi
export bold dim red green yellow plain

say() { printf '%s\n' "$*"; }
note() { printf '%s%s%s\n' "$dim" "$*" "$plain"; }
title() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
warn() { printf '%s%s%s\n' "$yellow" "$*" "$plain" >&2; }
fail() {
	printf '%s%s%s\n' "$red" "$*" "$plain" >&2
	exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }
is_root() { [[ $(id -u) -eq 0 ]]; }

# cgroup2_root is where the unified hierarchy is mounted: /sys/fs/cgroup, or beside v1 on a hybrid host.
cgroup2_root() {
	local mountpoint
	mountpoint=$(awk '{ for (i = 7; i < NF; i++) if ($i == "-" && $(i + 1) == "cgroup2") { print $5; exit } }' /proc/self/mountinfo)
	[[ -n $mountpoint ]] || fail "no cgroup2 is mounted here (see /proc/self/mountinfo): mount -t cgroup2 none /mnt"
	printf '%s' "$mountpoint"
}

# need_go explains itself where Go is missing or too old to fetch the version that go.mod asks for.
need_go() {
	have go || fail "Go is not on PATH: install $(sed -n 's/^go /go /p' "$root/go.mod") or newer from https://go.dev/dl"
}

version() { git -C "$root" describe --always --dirty --tags 2>/dev/null || echo devel; }
cache() { printf '%s' "${XDG_CACHE_HOME:-$HOME/.cache}/pillion"; }
