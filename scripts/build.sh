#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# build.sh [OUTPUT]: the static binary, by default bin/pillion. The same flags serve `make build`, the demo and the image.

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

need_go
output=${1:-$root/bin/pillion}
cd "$root"
CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$(version)" -o "$output" ./cmd/pillion
