#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The whole job on real programs: curl and nginx, unmodified, in two network namespaces, a sidecar beside each. Every hop
# tells which addresses it saw; this compares them, and fails where one is not true. Whatever happens, the host is left
# as it was: two namespaces, two cgroups and one temporary folder are made, and removed at the end.

. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

is_root || fail "the demo makes network namespaces and loads BPF programs: run it as root (sudo make demo)"
began=$SECONDS
need_go
"$root/scripts/deps.sh" demo
# Its names are the same every time, so that the next one finds what a killed one left. One at a time, on this kernel.
cgroups=$(cgroup2_root)
exec 9<"$cgroups"
flock -n 9 || fail "another demo is running"
rm -rf "${TMPDIR:-/tmp}"/pillion-demo.*
work=$(mktemp -d "${TMPDIR:-/tmp}/pillion-demo.XXXXXX")
chmod 0755 "$work" # the sidecar's user reads the binary here
note "building pillion"
"$root/scripts/build.sh" "$work/pillion"

pillion=$work/pillion
ends=(client server)
netns() { echo "pillion-demo-$1"; }
cgroup() { echo "$cgroups/pillion-demo-$1"; }

# end_processes ends what runs in the cgroups of this demo: only what it started is in them.
end_processes() {
	local end signal pids
	for signal in TERM KILL; do
		for _ in {1..30}; do
			pids=()
			for end in "${ends[@]}"; do
				mapfile -t -O ${#pids[@]} pids < <(cat "$(cgroup "$end")"/{,app/,sidecar/}cgroup.procs 2>/dev/null)
			done
			[[ ${#pids[@]} -gt 0 ]] || return 0
			kill -"$signal" "${pids[@]}" 2>/dev/null || true
			sleep 0.1
		done
	done
}

remove_everything() {
	local end
	end_processes
	for end in "${ends[@]}"; do
		if [[ -d $(cgroup "$end") && -e /run/netns/$(netns "$end") ]]; then
			nsenter --net="/run/netns/$(netns "$end")" "$pillion" clean --cgroup "$(cgroup "$end")" >/dev/null 2>&1 || true
		fi
		ip netns del "$(netns "$end")" 2>/dev/null || true
		rmdir "$(cgroup "$end")"/{app,sidecar,} 2>/dev/null || true
	done
}

finish() {
	local status=$? end
	trap - EXIT
	set +e
	if [[ $status -ne 0 ]]; then
		for end in "${ends[@]}"; do
			[[ -s $work/$end.log ]] || continue
			warn "last words of the ${end}'s sidecar:"
			tail -n 8 "$work/$end.log" >&2
		done
	fi
	remove_everything
	rm -rf "$work"
	exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM
remove_everything # of a demo that was killed

# inside END CGROUP COMMAND: in the network namespace of that end, and in app/ or sidecar/ of its cgroup. Never by
# `ip netns exec`, which mounts a /sys without the host's cgroups.
inside() {
	# shellcheck disable=SC2016 # for the inner shell
	nsenter --net="/run/netns/$(netns "$1")" -- sh -c 'echo $$ >"$0/cgroup.procs" && exec "$@"' "$(cgroup "$1")/$2" "${@:3}" 9<&-
}
at() { nsenter --net="/run/netns/$(netns "$1")" -- "${@:2}" 9<&-; }
shown() {
	note "  \$ $1"
	"${@:2}" 2>&1 | sed 's/^/    /'
}
wait_until() {
	local what=$1
	for _ in {1..100}; do
		if "${@:2}"; then return 0; fi
		sleep 0.1
	done
	fail "waited 10 s in vain: $what"
}

title "Two hosts: network namespaces, joined by a veth pair"
for end in "${ends[@]}"; do
	ip netns add "$(netns "$end")"
	mkdir -p "$(cgroup "$end")"/{app,sidecar}
done
ip link add eth0 netns "$(netns client)" type veth peer name eth0 netns "$(netns server)"
number=1
for end in "${ends[@]}"; do
	at "$end" ip link set lo up
	at "$end" ip addr add "10.201.0.$number/24" dev eth0
	at "$end" ip addr add "fd2a:1::$number/64" dev eth0 nodad
	at "$end" ip link set eth0 up
	say "  $end  10.201.0.$number  fd2a:1::$number"
	number=$((number + 1))
done
settled() { [[ -z $(at client ip -6 addr show tentative)$(at server ip -6 addr show tentative) ]]; }
wait_until "IPv6 addresses that are no longer tentative" settled

# snapshot END: what the capture may change in a network namespace.
snapshot() {
	# shellcheck disable=SC2016
	at "$1" sh -c '
		for family in -4 -6; do ip $family rule show; ip $family route show table all; done
		for device in lo eth0; do
			tc qdisc show dev $device
			tc filter show dev $device ingress 2>/dev/null
			tc filter show dev $device egress 2>/dev/null
		done
		grep -r "" /proc/sys/net/ipv4 /proc/sys/net/ipv6 2>/dev/null | grep -v tcp_fastopen_key | sort'
}
for end in "${ends[@]}"; do snapshot "$end" >"$work/$end.before"; done

title "The capture, on both: it stays, the program exits"
for end in "${ends[@]}"; do
	shown "pillion init --cgroup $(cgroup "$end")    # on the $end" at "$end" "$pillion" init --cgroup "$(cgroup "$end")"
done
title "nginx on the server, as Debian ships it; and the sidecars"
mkdir -p "$work/nginx/www"
printf 'hello, this is nginx: I talk to you, not to a proxy\n' >"$work/nginx/www/index.html"
cat >"$work/nginx/nginx.conf" <<'CONF'
daemon off;
user nobody nogroup;
worker_processes 1;
pid nginx.pid;
error_log stderr;
events { worker_connections 64; }
http {
	log_format ends '$remote_addr $remote_port $server_addr $server_port';
	access_log access.log ends;
	client_body_temp_path body;
	proxy_temp_path proxy;
	fastcgi_temp_path fastcgi;
	uwsgi_temp_path uwsgi;
	scgi_temp_path scgi;
	server {
		listen 80;
		listen [::]:80;
		root www;
	}
}
CONF
inside server app nginx -e stderr -p "$work/nginx" -c nginx.conf >"$work/nginx.log" 2>&1 &
wait_until "nginx listens" test -s "$work/nginx/nginx.pid"
say "  nginx listens on port 80, and logs its own address and that of each client"
for end in "${ends[@]}"; do
	inside "$end" sidecar setpriv --reuid 1666 --regid 1666 --clear-groups --no-new-privs \
		--inh-caps=-all,+net_raw --ambient-caps=-all,+net_raw --bounding-set=-all,+net_raw \
		"$pillion" proxy --log-format json >"$work/$end.log" 2>&1 &
done
ready() { at "$1" curl -s -f -o /dev/null --max-time 1 http://127.0.0.1:16020/healthz/ready; }
for end in "${ends[@]}"; do
	wait_until "the ${end}'s sidecar is ready" ready "$end"
	note "  \$ pillion proxy    # on the $end, as user 1666 with CAP_NET_RAW alone: ready"
done

# field FILE KEY: of the one access log line of a file.
field() { sed -n "s/.*\"$2\":\"\{0,1\}\([^\",}]*\).*/\1/p" "$1"; }
# record END DIRECTION DESTINATION FILE: the access log line of that connection, once it has closed.
record() { grep "\"direction\":\"$2\"" "$work/$1.log" | grep -F "\"destination\":\"$3\"" | tail -n 1 >"$4"; }
same() {
	if [[ $2 != "$3" ]]; then
		wrong=1
		warn "  not true: $1: $2, expected $3"
	fi
}
row() { printf '  %-18s %-24s %-20s %10s %10s\n' "$@"; }

# show FAMILY CLIENT SERVER: one request, and what each of the four saw. IPv6 addresses come in brackets.
show() {
	local family=$1 client=$2 server=$3 curled accepted dialled
	title "curl http://$server/ on the client, $family"
	: >"$work/nginx/access.log"
	curled=$(inside client app curl --silent --show-error --noproxy '*' --max-time 10 --globoff --output "$work/page" \
		--write-out '%{local_ip} %{local_port} %{remote_ip} %{remote_port}' "http://$server/")
	cmp -s "$work/page" "$work/nginx/www/index.html" || fail "curl received another page than nginx has"
	say "  $(cat "$work/page")"
	read -r ip port peer peerport <<<"$curled"
	wait_until "a line in nginx's log" test -s "$work/nginx/access.log"
	read -r seen seenport own ownport <"$work/nginx/access.log"
	if [[ $family == IPv6 ]]; then ip="[$ip]" peer="[$peer]" seen="[$seen]" own="${own#[}" own="[${own%]}]"; fi
	wait_until "the client's sidecar logs the connection" record client outbound "$server:80" "$work/out"
	wait_until "the server's sidecar logs the connection" record server inbound "$server:80" "$work/in"
	accepted=$(field "$work/in" source) dialled=$(field "$work/in" upstream_source)

	printf '%s' "$bold"
	row '' from to sent received
	printf '%s' "$plain"
	row curl "$ip:$port" "$peer:$peerport" '' ''
	row "client's sidecar" "$(field "$work/out" source)" "$(field "$work/out" destination)" "$(field "$work/out" bytes_sent)" "$(field "$work/out" bytes_received)"
	row "server's sidecar" "$accepted" "$(field "$work/in" destination)" "$(field "$work/in" bytes_sent)" "$(field "$work/in" bytes_received)"
	row nginx "$seen:$seenport" "$own:$ownport" '' ''

	same "curl's own address" "$ip" "$client"
	same "curl's peer" "$peer:$peerport" "$server:80"
	same "what the client's sidecar accepted" "$(field "$work/out" source)" "$ip:$port"
	same "what the server's sidecar accepted" "$accepted" "$(field "$work/out" upstream_source)"
	same "the client that nginx saw" "$seen" "$client"
	same "the port of it" "$seen:$seenport" "$dialled"
	same "nginx's own address" "$own:$ownport" "$server:80"
	same "bytes, in both sidecars" \
		"$(printf '%s\n' "$(field "$work/in" bytes_sent)" "$(field "$work/in" bytes_received)" | sort -n | xargs)" \
		"$(printf '%s\n' "$(field "$work/out" bytes_sent)" "$(field "$work/out" bytes_received)" | sort -n | xargs)"
	[[ $(field "$work/out" bytes_received) -ge $(stat -c %s "$work/page") ]] || fail "the client's sidecar counted fewer bytes than the page has"
	[[ -z $wrong ]] || fail "an address is not true"
	say "  ${green}✔ every address is the true one at every hop${plain}; only the client's port is new at each dial"
}
wrong=''
show IPv4 10.201.0.1 10.201.0.2
show IPv6 '[fd2a:1::1]' '[fd2a:1::2]'
note "  the sidecars' access log, last line of each:"
tail -q -n 1 "$work/client.log" "$work/server.log" | sed 's/^/    /'

title "pillion status"
# The rules, routes and sysctls are many: they are counted here.
status_in_short() {
	at client "$pillion" status --cgroup "$(cgroup client)" >"$work/status"
	grep -v -E '^ +(rule|route|sysctl) ' "$work/status"
	say "  and $(grep -c -E '^ +(rule|route|sysctl) .* ok ' "$work/status") rules, routes and sysctls, ok"
	! grep -E '^ +(rule|route|sysctl) ' "$work/status" | grep -v ' ok '
}
shown "pillion status --cgroup $(cgroup client)    # on the client" status_in_short

title "pillion run: any command, no setup"
shown "pillion run -- curl http://10.201.0.2/    # on the client" \
	at client "$pillion" run --report table -- curl --silent --show-error --noproxy '*' --max-time 10 http://10.201.0.2/

title "Leaving as we came"
end_processes
for end in "${ends[@]}"; do
	shown "pillion clean --cgroup $(cgroup "$end")    # on the $end" at "$end" "$pillion" clean --cgroup "$(cgroup "$end")"
done
for end in "${ends[@]}"; do
	snapshot "$end" >"$work/$end.after"
	if ! diff "$work/$end.before" "$work/$end.after" >"$work/left"; then
		warn "$(head -n 20 "$work/left")"
		fail "pillion clean left something on the $end (< before, > after)"
	fi
done
say "  ${green}✔ rules, routes, filters and sysctls are what they were before, on both${plain}"
note "took $((SECONDS - began)) s"
