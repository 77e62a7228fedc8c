#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The container image, by deploy/Dockerfile, with whichever builder works here. The same tree gives the same image, bit by
# bit, with podman and buildah. From the environment:
#
#   IMAGE    its name; default pillion:VERSION. The one for the backends tproxy and redirect, with iptables in it, has
#            "-iptables" behind its tag
#   ARCH     amd64 or arm64; default this machine's. An image for another has "-ARCH" behind its tag, and none with iptables
#            is made
#   FLAVOUR  plain, iptables; default both
#   SBOM     file for the list of what is in the binary (CycloneDX, JSON); default bin/pillion-ARCH.cdx.json

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

builder=
if have buildah; then
	builder='buildah build --no-cache --timestamp 0'
elif have podman; then
	builder='podman build --no-cache --timestamp 0'
elif have docker && docker info >/dev/null 2>&1; then
	builder='docker build --no-cache'
	export SOURCE_DATE_EPOCH=0
else
	fail "no builder of images works here. Install one: apt-get install --no-install-recommends buildah
(podman and docker, with its engine running, do as well)"
fi

"$root/scripts/deps.sh" build
need_go
own=$(go env GOHOSTARCH)
export GOARCH=${ARCH:-$own}
image=${IMAGE:-pillion:$(version)}
if [[ $GOARCH != "$own" ]]; then image+=-$GOARCH; fi
context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
rootfs=$context/rootfs
mkdir "$rootfs"
chmod 0755 "$rootfs"
"$root/scripts/build.sh" "$rootfs/pillion"
chmod 0755 "$rootfs/pillion"
# Kubernetes gives a container that is not root its capabilities only through the file: permitted, not in effect, so that
# it can be executed without them too. The sidecar takes it into effect by itself.
if is_root && have setcap; then
	setcap cap_net_raw+p "$rootfs/pillion"
else
	warn "not root, or no setcap (libcap2-bin): in Kubernetes, where the sidecar is not root, this image serves the backend redirect alone"
fi

sbom=${SBOM:-$root/bin/pillion-$GOARCH.cdx.json}
mkdir -p "$(dirname "$sbom")"
GOARCH='' "$("$root/scripts/tool.sh" cyclonedx-gomod)" bin -json -noserial -output "$sbom" "$rootfs/pillion" 2>/dev/null ||
	fail "the list of what is in the binary could not be written to $sbom"

# build TAG LICENSES: an image of rootfs.
build() {
	find "$rootfs" -exec touch --no-dereference --date=@0 {} +
	say "$builder $1 ($GOARCH, $(du -sh "$rootfs" | cut -f 1))"
	# shellcheck disable=SC2086 # a program and its arguments
	$builder --quiet --platform "linux/$GOARCH" --file "$root/deploy/Dockerfile" --tag "$1" --build-arg "LICENSES=$2" \
		--build-arg "VERSION=$(version)" --build-arg "REVISION=$(git -C "$root" rev-parse HEAD 2>/dev/null || echo unknown)" "$context"
}

# add_iptables puts Debian's programs and all that they load into rootfs.
add_iptables() {
	if ! have apt-get || ! have dpkg-deb; then
		fail "the image with iptables takes the programs from Debian packages, by apt-get and dpkg-deb (FLAVOUR=plain makes the other)"
	fi
	mkdir "$context/packages" "$context/unpacked"
	if is_root; then chmod 0777 "$context" "$context/packages"; fi # for apt's own user
	(
		cd "$context/packages" || exit
		apt-get -q download iptables libip4tc2 libip6tc2 libmnl0 libnetfilter-conntrack3 libnfnetlink0 libnftnl11 libxtables12 libc6 netbase >log 2>&1 ||
			fail "download of the Debian packages failed (apt-get update first?):
$(tail -n 5 log)"
		for package in *.deb; do dpkg-deb --extract "$package" "$context/unpacked"; done
	)
	local from=$context/unpacked
	mkdir -p "$rootfs"/usr/sbin "$rootfs/run" "$rootfs/usr/share/doc" "$rootfs/etc"
	cp -a "$from"/usr/sbin/{xtables-*-multi,iptables-{nft,legacy}*,ip6tables-{nft,legacy}*} "$rootfs/usr/sbin/"
	local tool
	for tool in iptables ip6tables; do # what Debian's alternatives would make
		ln -s "$tool-nft" "$rootfs/usr/sbin/$tool"
		ln -s "$tool-nft-save" "$rootfs/usr/sbin/$tool-save"
		ln -s "$tool-nft-restore" "$rootfs/usr/sbin/$tool-restore"
	done
	cp "$from"/etc/{protocols,services,ethertypes} "$rootfs/etc/"
	local lib
	for lib in "$from"/lib "$from"/usr/lib "$from"/lib64; do
		[[ -d $lib ]] || continue
		mkdir -p "$rootfs/${lib#"$from"/}"
		cp -a "$lib"/. "$rootfs/${lib#"$from"/}/"
	done
	# Of the C library only what these programs load.
	find "$rootfs" -path '*/gconv' -prune -exec rm -rf {} + -o -path '*/audit' -prune -exec rm -rf {} +
	find "$rootfs" -name '*.so*' ! -name 'ld-linux*' ! -name 'libc.so*' ! -name 'libm.so*' ! -name 'libdl.so*' ! -path '*/xtables/*' \
		! -name 'libip*tc*' ! -name 'libmnl*' ! -name 'libn*' ! -name 'libxtables*' -delete
	find "$rootfs" \( -name 'libnss_*' -o -name 'libnsl*' -o -name 'libcrypt*' \) -delete
	local package
	for package in iptables libc6 libxtables12 libmnl0 libnftnl11 libip4tc2 libip6tc2 libnetfilter-conntrack3 libnfnetlink0; do
		mkdir -p "$rootfs/usr/share/doc/$package"
		cp "$from/usr/share/doc/$package/copyright" "$rootfs/usr/share/doc/$package/"
	done
	find "$rootfs" -type d -empty ! -path "$rootfs/run" -delete
}

flavour=${FLAVOUR:-both}
licenses="Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)"
case $flavour in
plain | iptables | both) ;;
*) fail "FLAVOUR=$flavour: there are plain, iptables and both" ;;
esac
if [[ $flavour != iptables ]]; then build "$image" "$licenses"; fi
if [[ $flavour != plain ]]; then
	if [[ $GOARCH != "$own" ]]; then
		[[ $flavour == both ]] || fail "the image with iptables is made for this machine's $own alone"
		note "none with iptables: it is made for this machine's $own alone"
		exit 0
	fi
	add_iptables
	build "$image-iptables" "$licenses AND GPL-2.0-or-later AND LGPL-2.1-or-later"
fi
