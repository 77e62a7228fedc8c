/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Which connections are captured: config.Selection, as one trie. Each dimension is a kind of key; ranges of ports and ids
 * are cut into prefixes by the loader, which also gives every prefix what the shorter ones around it say, so that one
 * lookup of the longest match is the whole answer.
 */
#ifndef PILLION_SELECT_H
#define PILLION_SELECT_H

#include "common.h"

enum select_flag { SELECT_INCLUDE = 1, SELECT_EXCLUDE = 2 };

/* Made of whole 8-byte words, so that it can be built on the stack (see common.h). */
struct select_key {
	__u64 head; /* __u32 prefix length in bits, counted from the kind on; enum select_kind */
	__u64 high, low;
};

/* Written by the loader before the programs are attached, read by all. The loader sets its size. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__type(key, struct select_key);
	__type(value, enum select_flag);
} selection SEC(".maps");

/* Two words in the order of memory. */
static __always_inline __u64 pair(__u32 first, __u32 second)
{
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
	return first | (__u64)second << 32;
#else
	return (__u64)first << 32 | second;
#endif
}

static __always_inline int has_entries(__u32 kind)
{
	return cfg.selects & kind;
}

/* Does the dimension let in what the words of the key say? Of a shorter value, the rest is 0. */
static __always_inline int lets_in(__u32 kind, __u32 family, __u64 high, __u64 low)
{
	struct select_key key;
	enum select_flag *found;
	__u32 flags = 0;

	if (!has_entries(kind))
		return 1;
	key.head = pair(32 + 128, kind | family);
	key.high = high;
	key.low = low;
	found = bpf_map_lookup_elem(&selection, &key);
	if (found)
		flags = *found;
	if (flags & SELECT_EXCLUDE)
		return 0;
	return (flags & SELECT_INCLUDE) || !(cfg.includes & kind);
}

/* A port in host order. */
static __always_inline int lets_port_in(__u32 kind, __u32 port)
{
	return lets_in(kind, 0, pair(bpf_htonl(port << 16), 0), 0);
}

static __always_inline int lets_id_in(__u32 kind, __u32 id)
{
	return lets_in(kind, 0, pair(bpf_htonl(id), 0), 0);
}

/* Addresses in network order. */
static __always_inline int lets_ipv4_in(__u32 kind, __u32 address)
{
	return lets_in(kind, SELECT_IPV4, pair(address, 0), 0);
}

static __always_inline int lets_ipv6_in(__u32 kind, __u32 a, __u32 b, __u32 c, __u32 d)
{
	return lets_in(kind, 0, pair(a, b), pair(c, d));
}

/* How deep below the root of the hierarchy an excluded cgroup may lie. */
#define CGROUP_DEPTH 16

/* Is the current process in an excluded cgroup, or below one? */
static __always_inline int in_excluded_cgroup(void)
{
	if (!has_entries(SELECT_CGROUP))
		return 0;
#pragma unroll
	for (int level = 1; level <= CGROUP_DEPTH; level++) {
		__u64 id = bpf_get_current_ancestor_cgroup_id(level);
		if (!id)
			return 0;
		if (!lets_in(SELECT_CGROUP, 0, id, 0))
			return 1;
	}
	return 0;
}

/* Does the selection let the connection in? The socket's maker was judged when it was made. */
static __always_inline int is_selected(struct bpf_sock_ops *ctx, __u32 maker, int ipv4)
{
	__u32 a, b, c, d;

	if (maker == MAKER_APP_UNSELECTED || maker == MAKER_EXCLUDED)
		return 0;
	if (has_entries(SELECT_OUT_PORT)) {
		barrier();
		a = ctx->remote_port; /* network order, in the upper half where the kernel is little endian */
		if (!lets_port_in(SELECT_OUT_PORT, bpf_ntohl(a) & 0xffff))
			return 0;
	}
	if (!has_entries(SELECT_OUT_ADDRESS))
		return 1;
	if (ipv4) {
		barrier();
		a = ctx->remote_ip4;
		return lets_ipv4_in(SELECT_OUT_ADDRESS, a);
	}
	barrier();
	a = ctx->remote_ip6[0];
	b = ctx->remote_ip6[1];
	c = ctx->remote_ip6[2];
	d = ctx->remote_ip6[3];
	return lets_ipv6_in(SELECT_OUT_ADDRESS, a, b, c, d);
}

#endif
