//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * The capture once more, with a faster cure for a SYN that meets a TIME_WAIT: 0.5 ms instead of two ticks. It reads the
 * sequence number that TIME_WAIT expects out of kernel memory, which takes CAP_PERFMON and a kernel with BTF; the loader
 * tries it and falls back to capture.bpf.c.
 */
#include "common.h"

#define settle_time_wait kill_time_wait
struct scratch;
static __always_inline int kill_time_wait(struct __sk_buff *skb, struct scratch *s, __u64 behind);

#include "packet.h"

/* The one field that is needed, at the place where the running kernel has it (CO-RE). */
struct sock_common {
	__u32 skc_tw_rcv_nxt;
} __attribute__((preserve_access_index));
struct inet_timewait_sock {
	struct sock_common __tw_common;
} __attribute__((preserve_access_index));
struct tcp_timewait_sock {
	struct inet_timewait_sock tw_sk;
} __attribute__((preserve_access_index));

/* Written into tc_index of the copy, which it keeps on its way round. Nothing else on a packet's way in here uses that. */
#define COPY 0x504c

/*
 * A copy of the SYN is sent behind this packet, and the packet becomes the reset that ends the TIME_WAIT. If the copy
 * meets a TIME_WAIT again, that reset was not heeded (an older timestamp, RFC 7323 section 5.3; tcp_rfc1337; a firewall):
 * another copy would fare no better, and copies would go round without an end. It becomes a challenge.
 */
static __always_inline int kill_time_wait(struct __sk_buff *skb, struct scratch *s, __u64 behind)
{
	struct packet *p = &s->p;
	struct bpf_sock *sk;
	struct tcp_timewait_sock *tw;

	if (skb->tc_index == COPY)
		return set_flags(skb, s, TCP_ACK);
	sk = lookup(skb, p);
	if (!sk)
		return -1;
	tw = bpf_skc_to_tcp_timewait_sock(sk);
	if (!tw) {
		bpf_sk_release(sk);
		return -1;
	}
	s->ack = bpf_htonl(tw->tw_sk.__tw_common.skc_tw_rcv_nxt);
	bpf_sk_release(sk);
	skb->tc_index = COPY;
	if (bpf_clone_redirect(skb, skb->ifindex, behind) || set_flags(skb, s, TCP_RST) ||
	    bpf_l4_csum_replace(skb, p->l4 + TCP_CSUM, p->seq, s->ack, 4))
		return -1;
	return bpf_skb_store_bytes(skb, p->l4 + TCP_SEQ, &s->ack, 4, 0);
}

#include "capture.bpf.c"
