#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# vm-programs.sh [FLAGS OF test/vm]: clients and servers that we did not write, as an ordinary user runs them by `pillion run`, on the
# kernels that users have, each in a virtual machine with Debian's newest of every program.

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

need_go
"$root/scripts/deps.sh" vm
cd "$root"
work=$(mktemp -d "${TMPDIR:-/tmp}/pillion-vm-programs.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

# Packages are unpacked, not configured: what sshd asks PAM for is not there.
printf '%s required pam_permit.so\n' auth account session >"$work/pam"
packages=curl,nginx-light,openssl,redis-server,redis-tools,postgresql,postgresql-client,openssh-server,openssh-client
packages+=,git,golang-go,default-jre-headless,nodejs,python3
packages+=,iproute2,iptables,util-linux,coreutils,bash,dash,libc-bin,base-files
go run ./test/vm -full -suites test/e2e -run TestRealProgramsRootless -packages "$packages" -memory 4096 -files "$work/pam=/etc/pam.d/sshd,$work/pam=/etc/pam.d/other" "$@"
