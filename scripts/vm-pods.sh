#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# vm-pods.sh [FLAGS OF test/vm]: real pods on the kernels that users have, each in a virtual machine with a pure cgroup2
# hierarchy and Debian's newest podman. The images are built here, where Go is; the pods and their tests are those of test/pod.

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

need_go
"$root/scripts/deps.sh" vm-pods
cd "$root"
work=$(mktemp -d "${TMPDIR:-/tmp}/pillion-vm-pods.XXXXXX")
finish() {
	awk -v work="$work/" 'index($5, work) == 1 { print $5 }' /proc/self/mountinfo | tac | xargs -r umount -l
	rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT TERM

image=localhost/pillion-test:plain # as test/pod names it
export CONTAINERS_STORAGE_CONF=$work/storage.conf CONTAINERS_CONF=$work/containers.conf
printf '[network]\nnetwork_backend = "netavark"\n' >"$CONTAINERS_CONF"
printf '[storage]\ndriver = "vfs"\ngraphroot = "%s/graph"\nrunroot = "%s/run"\n' "$work" "$work" >"$CONTAINERS_STORAGE_CONF"
IMAGE=$image SBOM=$work/sbom.json scripts/image.sh
podman save --quiet --multi-image-archive --output "$work/images.tar" "$image" "$image-iptables" >/dev/null

# What a node has, and what the images of the apps are made of.
packages=podman,crun,conmon,netavark,catatonit,nftables,iptables,iproute2,mount,util-linux,libc-bin,base-files,bash,coreutils,grep,sed
packages+=,nginx-light,curl,busybox-static
go run ./test/vm -suites test/pod -packages "$packages" -memory 3072 -timeout 14m \
	-files "$work/images.tar=/images.tar" -env PILLION_TEST_IMAGES=/images.tar "$@"
