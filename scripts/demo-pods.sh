#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The sidecar in real pods: `pillion inject` writes it into the manifests of a web server and of a client that know nothing
# of it, podman plays them, and they talk. Everything is in a network namespace and a temporary folder, which go at the end.

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

is_root || fail "the demo runs privileged containers: run it as root (sudo make demo-pods)"
began=$SECONDS
need_go
"$root/scripts/deps.sh" demo-pods
cgroups=$(cgroup2_root)
exec 9<"$cgroups"
flock -n 9 || fail "another demo is running"
work=$(mktemp -d "${TMPDIR:-/tmp}/pillion-demo-pods.XXXXXX")
chmod 0755 "$work"
node=pillion-demo-node
files=$root/test/pod/testdata
export CONTAINERS_CONF=$work/containers.conf CONTAINERS_STORAGE_CONF=$work/storage.conf CONTAINERS_REGISTRIES_CONF=$work/registries.conf
sed "s|DIR|$work|; s|NETWORKS|networks|; s|RUNTIME|runc|" "$files/containers.conf" >"$CONTAINERS_CONF"
printf '[storage]\ndriver = "overlay"\ngraphroot = "%s/graph"\nrunroot = "%s/run"\n' "$work" "$work" >"$CONTAINERS_STORAGE_CONF"
: >"$CONTAINERS_REGISTRIES_CONF"
mkdir "$work/networks" "$work/empty"

podman() { (cd "$work/empty" && nsenter --net="/run/netns/$node" podman "$@" 9<&-); }
parents() { ls -d /sys/fs/cgroup/*/libpod_parent /sys/fs/cgroup/libpod_parent 2>/dev/null || true; }
parents_before=$(parents)

remove_everything() {
	local dir
	podman pod rm --all --force --time=0 >/dev/null 2>&1
	awk -v work="$work/" 'index($5, work) == 1 { print $5 }' /proc/self/mountinfo | tac | xargs -r umount -l
	for dir in $(parents); do # podman 4 leaves empty ones of pods
		rmdir "$dir"/* 2>/dev/null
		grep -q -x "$dir" <<<"$parents_before" || rmdir "$dir" 2>/dev/null
	done
	ip netns del "$node" 2>/dev/null
	rm -rf "$work"
}
finish() {
	local status=$? pod
	trap - EXIT
	set +e
	if [[ $status -ne 0 ]]; then
		for pod in web client; do
			warn "last words of the ${pod}'s containers:"
			{ podman logs --tail 5 "$pod-pillion-init" && podman logs --tail 5 "$pod-pillion"; } >&2
		done
	fi
	remove_everything
	exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

shown() {
	note "  \$ $1"
	"${@:2}" 2>&1 | sed 's/^/    /'
}

title "Images, FROM scratch: pillion, Debian's nginx, Debian's curl"
IMAGE=localhost/pillion:demo FLAVOUR=plain SBOM=$work/sbom.json "$root/scripts/image.sh" >"$work/image.log" || fail "$(cat "$work/image.log")"
# program_image NAME PROGRAM...: an image of programs of this host, and of the libraries that they load.
program_image() {
	local context=$work/context-$1 file
	mkdir -p "$context"/rootfs/{etc,srv,tmp,var/log/nginx,var/lib/nginx}
	printf 'root:x:0:0::/:\nnobody:x:65534:65534::/:\n' >"$context/rootfs/etc/passwd"
	printf 'root:x:0:\nnogroup:x:65534:\n' >"$context/rootfs/etc/group"
	cp "$files/nginx.conf" "$context/rootfs/etc/"
	for file in "${@:2}" $(ldd "${@:2}" 2>/dev/null | grep -o '/[^ :]*' | sort -u); do
		mkdir -p "$context/rootfs$(dirname "$file")"
		cp --dereference "$file" "$context/rootfs$file"
	done
	printf 'FROM scratch\nCOPY rootfs/ /\n' >"$context/Dockerfile"
	command podman build --quiet --tag "$1" "$context" >/dev/null
}
program_image localhost/pillion-test-web "$(command -v nginx || echo /usr/sbin/nginx)"
program_image localhost/pillion-test-shell /bin/busybox /usr/bin/curl
command podman images --format '  {{.Repository}}:{{.Tag}}  {{.Size}}'
"$root/scripts/build.sh" "$work/pillion"

title "Two manifests, as their authors wrote them; and what pillion inject makes of them"
for pod in web client; do sed "s/POD/$pod/" "$files/$pod.yaml" >"$work/$pod.yaml"; done
shown "pillion inject --diff web.yaml | head -n 20" head -n 20 <("$work/pillion" inject --image localhost/pillion:demo --sidecar ordinary --node-name=false --diff "$work/web.yaml" | sed "s|$work/||")
for pod in web client; do
	"$work/pillion" inject --image localhost/pillion:demo --sidecar ordinary --node-name=false "$work/$pod.yaml" >"$work/$pod.injected.yaml"
done

title "The pods"
ip netns add "$node"
nsenter --net="/run/netns/$node" ip link set lo up
podman network create --ipv6 --disable-dns --subnet 10.89.0.0/24 --subnet fd89::/64 demo >/dev/null
number=2
for pod in web client; do
	note "  \$ podman kube play $pod.injected.yaml"
	podman kube play --network "demo:ip=10.89.0.$number,ip6=fd89::$number" "$work/$pod.injected.yaml" >"$work/play.log" 2>&1 || fail "$(cat "$work/play.log")"
	say "    $pod  10.89.0.$number  fd89::$number"
	number=$((number + 1))
done
podman ps --format '  {{.Names}}  {{.Image}}  {{.Status}}'

wrong=''
for url in http://10.89.0.2 'http://[fd89::2]'; do
	title "curl $url, in the client's container"
	for _ in {1..100}; do
		if answer=$(podman exec client-app /usr/bin/curl -sS --max-time 20 -w '%{local_ip} to %{remote_ip}' "$url" 2>"$work/curl.log"); then break; fi
		sleep 0.1
	done
	mapfile -t seen <<<"$answer"
	say "  curl saw    ${seen[1]:-nothing: $(cat "$work/curl.log")}"
	say "  nginx saw   ${seen[0]}"
	case $url in
	*fd89*) want='fd89::3 came to fd89::2/fd89::3 to fd89::2' ;;
	*) want='10.89.0.3 came to 10.89.0.2/10.89.0.3 to 10.89.0.2' ;;
	esac
	[[ ${seen[0]}/${seen[1]:-} == "$want" ]] || wrong=1
done
[[ -z $wrong ]] || fail "an address is not true"
say "  ${green}✔ every address is the true one${plain}"

title "What the sidecars logged"
for pod in client web; do podman logs "$pod-pillion" 2>&1 | grep '"direction"' | sed 's/^/  /' || fail "the $pod's sidecar has carried nothing"; done

title "Leaving as we came"
for pod in client web; do podman kube down "$work/$pod.injected.yaml" >"$work/down.log" 2>&1 || fail "$(cat "$work/down.log")"; done
[[ -z $(podman ps --all --quiet) ]] || fail "containers are left: $(podman ps --all)"
if left=$(nsenter --net="/run/netns/$node" sh -c 'ip rule; ip -6 rule; iptables-save; ip6tables-save' | grep -E '^6[0-9]:|PILLION'); then
	fail "on the node is left: $left"
fi
say "  ${green}✔ no container, rule or packet filter of ours is on the node${plain}"
note "took $((SECONDS - began)) s"
