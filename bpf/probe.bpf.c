//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * Two short-lived helpers of the init step, in an object of their own: neither is there once it has ended.
 *
 *   pln_probe     lets a connection of our own arrive by a real interface, so that `verify` can see what happens to it
 *   pln_ancestry  tells the cgroups above a process that cannot see them
 */
#include "packet.h"

#define PROBE_MARK (1u << 31) /* config.ProbeMark */

/* The one connection that pln_probe takes. Key 0; written by the verifier, `arrived` by the program. */
struct probe {
	__u32 port;    /* source port, network order; 0: none */
	__u32 ifindex; /* where its packets are to arrive */
	__u8 mac[8];   /* that interface's address, in the first six bytes */
	__u64 arrived; /* SYNs sent there */
};
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct probe);
} probes SEC(".maps");

/*
 * Attached to the ingress of lo, before pln_lo, while `verify` runs. The verifier dials the app's address from an address
 * that is not ours, and is routed to lo by its mark; from there its packets go on to the ingress of a real interface, as
 * if a neighbour had sent them. The mark brings the answers back to lo. Returns UNSPEC, SHOT or a redirect. 5.10.
 */
SEC("tc")
int pln_probe(struct __sk_buff *skb)
{
	struct word key;
	struct probe *probe;
	struct scratch *s;

	if (!(skb->mark & PROBE_MARK))
		return TC_ACT_UNSPEC;
	key.v = 0;
	probe = bpf_map_lookup_elem(&probes, &key.v);
	if (!probe)
		return TC_ACT_UNSPEC;
	s = get_scratch();
	if (!s)
		return TC_ACT_UNSPEC;
	if (parse(skb, s, ETH_HLEN) != PARSED || s->p.sport != probe->port)
		return TC_ACT_UNSPEC;
	skb->mark = with_role(skb->mark, ROLE_DIAL_REPLY);
	if (bpf_skb_store_bytes(skb, 0, probe->mac, 6, 0))
		return TC_ACT_SHOT;
	/* All of it goes that way, not the SYN alone: behind a SYN cookie it is the ACK that makes the socket. */
	if (is_syn(&s->p))
		__sync_fetch_and_add(&probe->arrived, 1);
	return bpf_redirect(probe->ifindex, BPF_F_INGRESS);
}

/* Level -> cgroup id, 0 past the process's own cgroup. Level 0 is the root. Written by pln_ancestry. */
#define LEVELS 16
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, LEVELS);
	__type(key, __u32);
	__type(value, __u64);
} ancestors SEC(".maps");

/* Attached to the process's own cgroup for the time of one connect(2). Never refuses. 5.10. */
SEC("cgroup/connect4")
int pln_ancestry(struct bpf_sock_addr *ctx)
{
#pragma unroll
	for (int i = 0; i < LEVELS; i++) {
		struct word key;
		key.v = i;
		__u64 *id = bpf_map_lookup_elem(&ancestors, &key.v);
		if (id)
			*id = bpf_get_current_ancestor_cgroup_id(i);
	}
	return 1;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
