#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The container image, by deploy/Dockerfile, with whichever builder works here. IMAGE names it; default pillion:VERSION.

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

builder=
if have podman; then
	builder='podman build'
elif have buildah; then
	builder='buildah build'
elif have docker && docker info >/dev/null 2>&1; then
	builder='docker build'
else
	fail "no builder of images works here. Install one: apt-get install --no-install-recommends buildah
(podman and docker, with its engine running, do as well)"
fi

"$root/scripts/deps.sh" build
context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
"$root/scripts/build.sh" "$context/pillion"
image=${IMAGE:-pillion:$(version)}
say "$builder $image ($(du -h "$context/pillion" | cut -f 1))"
# shellcheck disable=SC2086 # two words: program and verb
$builder --quiet --file "$root/deploy/Dockerfile" --build-arg "VERSION=$(version)" --tag "$image" "$context"
