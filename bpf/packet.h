/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Packets: what is in them, who is at their end, and the three ways in which the capture changes one (challenge,
 * reset sent back, reset in place). Everything else passes through untouched.
 */
#ifndef PILLION_PACKET_H
#define PILLION_PACKET_H

#include "common.h"

/* Flags of the TCP header, RFC 9293 section 3.1. */
#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16

/* Offsets in it. */
#define TCP_SEQ 4
#define TCP_ACK_SEQ 8
#define TCP_DOFF_FLAGS 12
#define TCP_CSUM 16

/* Header fields are in network order. */
struct packet {
	struct bpf_sock_tuple tuple;
	__u16 sport, dport;
	__u32 v6;
	__u32 l4;       /* offset of the TCP header */
	__u32 flags;
	__u32 seq, ack;
	__u32 doff;     /* length of the TCP header in bytes */
	__u32 fragment; /* a first fragment: a socket assigned to it is lost in reassembly */
};

/* Where structures with narrow fields are built. tc runs with bottom halves off, so one per CPU is enough. */
struct scratch {
	struct packet p;
	__u8 header[40];
	__u8 extension[8];
	__u8 reset[20];
	__u8 pad[4];
	__u8 mac[12], swapped[12];
	__u16 ports[2];
	__u32 zero, ack;
	struct bpf_fib_lookup fib;
};
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} scratch SEC(".maps");

/* Cleared for a new packet; the caller tests for NULL, once. */
static __always_inline struct scratch *get_scratch(void)
{
	struct word key;
	key.v = 0;
	return bpf_map_lookup_elem(&scratch, &key.v);
}

enum parsed { PARSED = 0, NOT_TCP = -1, HEADER_CUT = -2 };

/* l2 is the length of the link header: 14, or 0 on devices that have none. */
static __always_inline int parse(struct __sk_buff *skb, struct scratch *s, __u32 l2)
{
	struct packet *p = &s->p;
	__u8 *b = s->header;

	__builtin_memset(p, 0, sizeof(*p));
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		if (bpf_skb_load_bytes(skb, l2, b, 20))
			return NOT_TCP;
		if (b[9] != IPPROTO_TCP || (b[6] & 0x1f) || b[7])
			return NOT_TCP; /* a later fragment has no ports */
		p->fragment = b[6] & 0x20;
		p->l4 = l2 + (b[0] & 15) * 4;
		__builtin_memcpy(&p->tuple.ipv4.saddr, b + 12, 4);
		__builtin_memcpy(&p->tuple.ipv4.daddr, b + 16, 4);
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		__u8 *e = s->extension;
		__u32 off = l2 + 40;
		__u8 next;

		if (bpf_skb_load_bytes(skb, l2, b, 40))
			return NOT_TCP;
		next = b[6];
#pragma unroll
		for (int i = 0; i < 4; i++) {
			if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
			    next != IPPROTO_FRAGMENT)
				break;
			if (bpf_skb_load_bytes(skb, off, e, 4))
				return NOT_TCP;
			if (next == IPPROTO_FRAGMENT) {
				if (e[2] || (e[3] & 0xf8))
					return NOT_TCP; /* a later fragment */
				p->fragment |= e[3] & 1;
				off += 8;
			} else {
				off += (e[1] + 1) * 8;
			}
			next = e[0];
		}
		if (next != IPPROTO_TCP)
			return NOT_TCP;
		p->v6 = 1;
		p->l4 = off;
		__builtin_memcpy(p->tuple.ipv6.saddr, b + 8, 16);
		__builtin_memcpy(p->tuple.ipv6.daddr, b + 24, 16);
	} else {
		return NOT_TCP;
	}
	if (bpf_skb_load_bytes(skb, p->l4, b, 20))
		return HEADER_CUT;
	__builtin_memcpy(&p->sport, b, 2);
	__builtin_memcpy(&p->dport, b + 2, 2);
	if (p->v6) {
		p->tuple.ipv6.sport = p->sport;
		p->tuple.ipv6.dport = p->dport;
		apart("ports6");
	} else {
		p->tuple.ipv4.sport = p->sport;
		p->tuple.ipv4.dport = p->dport;
		apart("ports4");
	}
	__builtin_memcpy(&p->seq, b + TCP_SEQ, 4);
	__builtin_memcpy(&p->ack, b + TCP_ACK_SEQ, 4);
	p->doff = (b[12] >> 4) * 4;
	p->flags = b[13];
	return PARSED;
}

static __always_inline int is_syn(struct packet *p)
{
	return (p->flags & (TCP_SYN | TCP_ACK | TCP_RST)) == TCP_SYN;
}

/* To fe80::/10. A socket with such an end is bound to its interface, and invisible to a lookup from lo. */
static __always_inline int to_link_local(struct packet *p)
{
	return p->v6 && (p->tuple.ipv6.daddr[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

/* The socket that the packet is for, or NULL. The caller releases it. */
static __always_inline struct bpf_sock *lookup(struct __sk_buff *skb, struct packet *p)
{
	if (p->v6)
		return bpf_skc_lookup_tcp(skb, &p->tuple, sizeof(p->tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
	return bpf_skc_lookup_tcp(skb, &p->tuple, sizeof(p->tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
}

/* Its state, or 0 where there is none. */
static __always_inline __u32 lookup_state(struct __sk_buff *skb, struct packet *p)
{
	struct bpf_sock *sk = lookup(skb, p);
	__u32 state;

	if (!sk)
		return 0;
	state = sk->state;
	bpf_sk_release(sk);
	return state;
}

/* Replaces the flags and mends the checksum. */
static __always_inline int set_flags(struct __sk_buff *skb, struct scratch *s, __u8 flags)
{
	__u8 *old = s->extension, *new = s->extension + 2;
	__u16 from, to;

	if (bpf_skb_load_bytes(skb, s->p.l4 + TCP_DOFF_FLAGS, old, 2))
		return -1;
	new[0] = old[0];
	new[1] = flags;
	__builtin_memcpy(&from, old, 2);
	__builtin_memcpy(&to, new, 2);
	if (bpf_l4_csum_replace(skb, s->p.l4 + TCP_CSUM, from, to, 2))
		return -1;
	return bpf_skb_store_bytes(skb, s->p.l4 + TCP_DOFF_FLAGS, new, 2, 0);
}

/*
 * A SYN met the TIME_WAIT of our own accepted socket, which would swallow it for up to a minute. As a bare ACK it is
 * answered with TIME_WAIT's own sequence numbers; the client resets that (RFC 9293 section 3.10.7.3) and sends its SYN
 * again, two ticks later. fast.bpf.c has a faster way, for those who may look into kernel memory.
 */
#ifndef settle_time_wait
static __always_inline int challenge(struct __sk_buff *skb, struct scratch *s, __u64 behind)
{
	return set_flags(skb, s, TCP_ACK);
}
#define settle_time_wait challenge
#endif

/* Where the fast way sends the copy of a SYN, so that it comes by again: out of lo, whose packets keep their route on the
 * way round; or into the interface once more. */
#define BEHIND_LO 0
#define BEHIND_NIC BPF_F_INGRESS

/*
 * Turns a SYN from outside into the reset that answers it (RFC 9293 section 3.10.7.1); the caller redirects it to where
 * it came from. The options stay, so that only header words change and the checksum is mended word by word, which is
 * right for full checksums and for those that hardware is to complete.
 */
static __always_inline int reply_reset(struct __sk_buff *skb, struct scratch *s, __u32 l2)
{
	struct packet *p = &s->p;

	s->zero = 0;
	s->ack = bpf_htonl(bpf_ntohl(p->seq) + 1);
	s->ports[0] = p->dport;
	s->ports[1] = p->sport;
	if (set_flags(skb, s, TCP_RST | TCP_ACK) ||
	    bpf_l4_csum_replace(skb, p->l4 + TCP_CSUM, p->seq, 0, 4) ||
	    bpf_l4_csum_replace(skb, p->l4 + TCP_CSUM, p->ack, s->ack, 4) ||
	    bpf_skb_store_bytes(skb, p->l4, s->ports, 4, 0) ||
	    bpf_skb_store_bytes(skb, p->l4 + TCP_SEQ, &s->zero, 4, 0) ||
	    bpf_skb_store_bytes(skb, p->l4 + TCP_ACK_SEQ, &s->ack, 4, 0))
		return -1;
	/* Swapped addresses leave the checksum as it is; a fresh hop limit is in the IPv4 header's checksum only. */
	if (p->v6) {
		s->header[0] = 64;
		if (bpf_skb_store_bytes(skb, l2 + 7, s->header, 1, 0) ||
		    bpf_skb_store_bytes(skb, l2 + 8, p->tuple.ipv6.daddr, 16, 0) ||
		    bpf_skb_store_bytes(skb, l2 + 24, p->tuple.ipv6.saddr, 16, 0))
			return -1;
	} else {
		__u16 from, to;
		if (bpf_skb_load_bytes(skb, l2 + 8, s->header, 2))
			return -1;
		__builtin_memcpy(&from, s->header, 2);
		s->header[0] = 64;
		__builtin_memcpy(&to, s->header, 2);
		if (bpf_l3_csum_replace(skb, l2 + 10, from, to, 2) ||
		    bpf_skb_store_bytes(skb, l2 + 8, s->header, 2, 0) ||
		    bpf_skb_store_bytes(skb, l2 + 12, &p->tuple.ipv4.daddr, 4, 0) ||
		    bpf_skb_store_bytes(skb, l2 + 16, &p->tuple.ipv4.saddr, 4, 0))
			return -1;
	}
	if (!l2)
		return 0;
	if (bpf_skb_load_bytes(skb, 0, s->mac, 12))
		return -1;
	__builtin_memcpy(s->swapped, s->mac + 6, 6);
	__builtin_memcpy(s->swapped + 6, s->mac, 6);
	return bpf_skb_store_bytes(skb, 0, s->swapped, 12, 0);
}

/*
 * Turns a packet on lo, in place, into the reset that answers it, to be passed on. On lo only: there the packet keeps
 * its route (local delivery) and an uncomputed checksum that nobody will look at.
 */
static __always_inline int reset_in_place(struct __sk_buff *skb, struct scratch *s)
{
	struct packet *p = &s->p;
	__u8 *h = s->reset;
	__u32 len = p->l4 + 20;

	__builtin_memset(h, 0, 20);
	__builtin_memcpy(h, &p->dport, 2);
	__builtin_memcpy(h + 2, &p->sport, 2);
	h[12] = 5 << 4;
	if (p->flags & TCP_ACK) {
		__builtin_memcpy(h + TCP_SEQ, &p->ack, 4);
		h[13] = TCP_RST;
	} else {
		__u32 used = skb->len - p->l4 - p->doff + !!(p->flags & TCP_SYN) + !!(p->flags & TCP_FIN);
		s->ack = bpf_htonl(bpf_ntohl(p->seq) + used);
		__builtin_memcpy(h + TCP_ACK_SEQ, &s->ack, 4);
		h[13] = TCP_RST | TCP_ACK;
	}
	if (bpf_skb_change_tail(skb, len, 0) || bpf_skb_store_bytes(skb, p->l4, h, 20, 0))
		return -1;
	if (p->v6) {
		s->ports[0] = bpf_htons(len - ETH_HLEN - 40);
		if (bpf_skb_store_bytes(skb, ETH_HLEN + 4, s->ports, 2, 0) ||
		    bpf_skb_store_bytes(skb, ETH_HLEN + 8, p->tuple.ipv6.daddr, 16, 0) ||
		    bpf_skb_store_bytes(skb, ETH_HLEN + 24, p->tuple.ipv6.saddr, 16, 0))
			return -1;
	} else {
		if (bpf_skb_load_bytes(skb, ETH_HLEN + 2, s->ports, 2))
			return -1;
		s->ports[1] = bpf_htons(len - ETH_HLEN);
		if (bpf_l3_csum_replace(skb, ETH_HLEN + 10, s->ports[0], s->ports[1], 2) ||
		    bpf_skb_store_bytes(skb, ETH_HLEN + 2, &s->ports[1], 2, 0) ||
		    bpf_skb_store_bytes(skb, ETH_HLEN + 12, &p->tuple.ipv4.daddr, 4, 0) ||
		    bpf_skb_store_bytes(skb, ETH_HLEN + 16, &p->tuple.ipv4.saddr, 4, 0))
			return -1;
	}
	skb->mark = with_role(skb->mark, ROLE_NONE);
	return 0;
}

/*
 * Is the packet for another host? NOT_FWDED is a local destination; with forwarding disabled nothing else could be
 * delivered anyway. Asked of the route, so that no list of own addresses is kept.
 */
static __always_inline int is_forwarded(struct __sk_buff *skb, struct scratch *s)
{
	struct bpf_fib_lookup *f = &s->fib;
	long r;

	__builtin_memset(f, 0, sizeof(*f));
	f->ifindex = skb->ingress_ifindex;
	f->l4_protocol = IPPROTO_TCP;
	if (s->p.v6) {
		f->family = AF_INET6;
		__builtin_memcpy(f->ipv6_src, s->p.tuple.ipv6.saddr, 16);
		__builtin_memcpy(f->ipv6_dst, s->p.tuple.ipv6.daddr, 16);
	} else {
		f->family = AF_INET;
		f->ipv4_src = s->p.tuple.ipv4.saddr;
		f->ipv4_dst = s->p.tuple.ipv4.daddr;
	}
	r = bpf_fib_lookup(skb, f, sizeof(*f), 0);
	return r != BPF_FIB_LKUP_RET_NOT_FWDED && r != BPF_FIB_LKUP_RET_FWD_DISABLED;
}

#endif
