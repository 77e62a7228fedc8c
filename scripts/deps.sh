#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# deps.sh TARGET...: installs the Debian packages that these make targets need, and only those that are missing.
# No service is started or enabled by it. Where it cannot install, it says what is missing; exit status 1.

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

packages_of() {
	case $1 in
	build | image) echo ca-certificates ;;
	demo) echo ca-certificates nginx-light curl iproute2 util-linux ;;
	test)
		echo ca-certificates gcc libc6-dev iproute2 iptables util-linux sudo curl openssl nginx-light \
			redis-server redis-tools postgresql postgresql-client openssh-server openssh-client \
			git nodejs python3 default-jre-headless \
			podman runc conmon netavark catatonit busybox-static libcap2-bin
		;;
	demo-pods) echo ca-certificates nginx-light curl iproute2 util-linux iptables podman runc conmon netavark catatonit busybox-static libcap2-bin ;;
	vm) echo ca-certificates qemu-system-x86 debian-archive-keyring iproute2 iptables util-linux curl busybox-static ;;
	vm-pods) echo ca-certificates qemu-system-x86 debian-archive-keyring podman netavark libcap2-bin ;;
	bench) echo ca-certificates iproute2 iptables util-linux slirp4netns haproxy nginx-light libnginx-mod-stream gnuplot-nox ;;
	lint) echo ca-certificates shellcheck git ;;
	generate) echo ca-certificates clang-14 llvm-14 libbpf-dev linux-libc-dev ;;
	ci) echo make git ;;
	*) fail "deps.sh: no list for \"$1\"; there are: build demo demo-pods test vm vm-pods bench lint generate image ci" ;;
	esac
}

# program_of names what a package is wanted for, so that a host without dpkg can be asked too. Nothing: a library.
program_of() {
	case $1 in
	nginx-light) echo nginx ;;
	gnuplot-nox) echo gnuplot ;;
	# Those of a user's own directory are not every user's.
	nodejs) echo /usr/bin/node ;;
	python3) echo /usr/bin/python3 ;;
	default-jre-headless) echo /usr/bin/keytool ;;
	iproute2) echo ip ;;
	util-linux) echo setpriv ;;
	redis-tools) echo redis-cli ;;
	postgresql-client) echo psql ;;
	postgresql) echo postgres ;;
	openssh-server) echo sshd ;;
	openssh-client) echo ssh ;;
	qemu-system-x86) echo qemu-system-x86_64 ;;
	busybox-static) echo busybox ;;
	netavark) echo /usr/lib/podman/netavark ;;
	libcap2-bin) echo setcap ;;
	llvm-14) echo llvm-strip-14 ;;
	ca-certificates | debian-archive-keyring | libc6-dev | libbpf-dev | linux-libc-dev | libnginx-mod-stream) ;;
	*) echo "$1" ;;
	esac
}

installed() {
	local program
	if have dpkg-query && [[ $(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null) == installed ]]; then
		return 0
	fi
	program=$(program_of "$1")
	if [[ -z $program ]]; then
		if have dpkg-query; then return 1; fi # elsewhere a library cannot be asked for: the build will tell
	else
		PATH=$PATH:/usr/sbin:/sbin:$(echo /usr/lib/postgresql/*/bin | tr ' ' ':') have "$program"
	fi
}

missing=()
for target in "$@"; do
	for package in $(packages_of "$target"); do
		if ! installed "$package" && [[ " ${missing[*]} " != *" $package "* ]]; then
			missing+=("$package")
		fi
	done
done
[[ ${#missing[@]} -gt 0 ]] || exit 0

have apt-get || fail "missing for \"make $*\": ${missing[*]}
This host has no apt-get. The names are Debian's: install what carries them here, then try again."
is_root || fail "missing for \"make $*\": ${missing[*]}
Not root, so nothing was installed. Run: sudo apt-get install --no-install-recommends ${missing[*]}"

# Debian asks /usr/sbin/policy-rc.d before a package starts its service. If the host has one, its word counts.
policy=/usr/sbin/policy-rc.d
log=$(mktemp)
restore() {
	rm -f "$log"
	if [[ -n ${made_policy:-} ]]; then rm -f "$policy"; fi
}
trap restore EXIT
trap 'exit 130' INT TERM
if [[ ! -e $policy && ! -L $policy ]]; then
	made_policy=1
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod 0755 "$policy"
fi

apt() {
	DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=l apt-get -y -q -o DPkg::Lock::Timeout=300 "$@" </dev/null 2>&1 |
		tee "$log" | sed -u -n "s/^\([0-9]* upgraded, .*\)\.$/  \1/p; s/^Setting up \(${wanted// /\\|}\) .*/  \1/p"
}
wanted=${missing[*]}
say "installing $wanted"
if ! apt install --no-install-recommends "${missing[@]}"; then
	say "  fetching the package lists first"
	apt update || warn "$(tail -n 5 "$log")"
	apt install --no-install-recommends "${missing[@]}" || fail "apt-get install failed:
$(tail -n 20 "$log")"
fi

# What a test needs is not what a host should run from its next boot on.
if [[ -d /run/systemd/system ]]; then
	for package in "${missing[@]}"; do
		case $package in
		nginx-light) units=nginx ;;
		redis-server | postgresql | haproxy) units=$package ;;
		openssh-server) units=ssh ;;
		*) continue ;;
		esac
		systemctl disable --quiet "$units" 2>/dev/null || warn "could not disable the service $units"
	done
fi
