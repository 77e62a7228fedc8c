//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * The kernel half: which connections are the app's, and the way of their packets to the sidecar and back. No address is
 * ever rewritten, and nothing is kept per connection; the direction of a packet is in three bits of its mark.
 *
 *   connect()  pln_connect4/6   clear a stale mark, look whether the proxy listens
 *   SYN        pln_sockops      mark the socket: after source selection, before the SYN leaves
 *   on lo      pln_lo           the app's packets to the proxy's sockets, and the proxy's to the app
 *   from a NIC pln_in           SYNs for the app's listeners to the inbound listener
 *   to a NIC   pln_out          nothing that is marked leaves
 *
 * ARCHITECTURE.md has the table of packets and verdicts.
 */
#include "packet.h"
#include "select.h"

/* ------------------------------------------------------------------ sockets are made: whose are they? */

static __always_inline int note_maker(struct bpf_sock *sk)
{
	struct word maker;
	__u64 ids;

	if (sk->type != SOCK_STREAM)
		return 1;
	ids = bpf_get_current_uid_gid();
	if (in_excluded_cgroup())
		maker.v = MAKER_EXCLUDED;
	else if (!lets_id_in(SELECT_UID, ids) || !lets_id_in(SELECT_GID, ids >> 32))
		maker.v = MAKER_APP_UNSELECTED;
	else
		maker.v = MAKER_APP;
	if ((__u32)ids == cfg.proxy_uid)
		maker.v |= MAKER_PROXYS_USER;
	bpf_sk_storage_get(&makers, sk, &maker.v, BPF_SK_STORAGE_GET_F_CREATE);
	return 1;
}

/* Attached to the cgroup; runs in socket(2). Never refuses. 5.10. */
SEC("cgroup/sock_create")
int pln_sock_create(struct bpf_sock *sk)
{
	return note_maker(sk);
}

/* Attached to the cgroup; run in bind(2). The socket behind an MPTCP listener is made by the kernel: sock_create never
 * sees it, its bind does. Never refuse. 5.10. */
SEC("cgroup/post_bind4")
int pln_post_bind4(struct bpf_sock *sk)
{
	return note_maker(sk);
}

SEC("cgroup/post_bind6")
int pln_post_bind6(struct bpf_sock *sk)
{
	return note_maker(sk);
}

/* ------------------------------------------------------------------ connect(): before the route is looked up */

/* The mark of an earlier connect that failed would decide the route and the source address of this one. It cannot be
 * cleared when the socket closes: tcp_disconnect changes the state before it sends the reset, which must still find
 * its way to the proxy. */
static __always_inline void clear_stale_mark(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct word mark;
	__u32 role;

	if (!sk || without(CURE_STALE_MARK))
		return;
	mark.v = sk->mark;
	role = role_of(mark.v);
	if (role != ROLE_OUT && role != ROLE_CLOSED && role != ROLE_CLOSED_BOUND)
		return;
	mark.v = with_role(mark.v, ROLE_NONE);
	bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark.v, sizeof(mark.v));
	count(COUNT_OUT_MARK_CLEARED);
}

static __always_inline void look_for_proxy(struct bpf_sock_addr *ctx, __u32 v6)
{
	struct bpf_sock *sk = proxy_listener(ctx, v6, cfg.port_out);
	__u32 found = 0;

	if (sk) {
		found = 1;
		bpf_sk_release(sk);
	}
	set_alive(v6, found);
}

/* Attached to the cgroup; runs in connect(2) on IPv4 sockets. Never refuses. 5.10. */
SEC("cgroup/connect4")
int pln_connect4(struct bpf_sock_addr *ctx)
{
	if (ctx->type != SOCK_STREAM)
		return 1;
	clear_stale_mark(ctx);
	if (cfg.mode_out != MODE_HOLD)
		look_for_proxy(ctx, 0);
	return 1;
}

/* The same on IPv6 sockets, IPv4-mapped destinations (RFC 4291 section 2.5.5.2) among them. 5.10. */
SEC("cgroup/connect6")
int pln_connect6(struct bpf_sock_addr *ctx)
{
	__u32 a, b, c;

	if (ctx->type != SOCK_STREAM)
		return 1;
	clear_stale_mark(ctx);
	if (cfg.mode_out == MODE_HOLD)
		return 1;
	a = ctx->user_ip6[0];
	b = ctx->user_ip6[1];
	c = ctx->user_ip6[2];
	if (a == 0 && b == 0 && c == bpf_htonl(0xffff))
		look_for_proxy(ctx, 0);
	else
		look_for_proxy(ctx, 1);
	return 1;
}

/* ------------------------------------------------------------------ the SYN is about to be sent: capture or not? */

static __always_inline void set_mark(struct bpf_sock_ops *ctx, __u32 old, __u32 role)
{
	struct word mark;

	mark.v = with_role(old, role);
	if (mark.v != old)
		bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark.v, sizeof(mark.v));
}

/* Does the socket speak IPv4, by itself or mapped? */
static __always_inline int speaks_ipv4(struct bpf_sock_ops *ctx)
{
	__u32 a, b, c;

	if (ctx->family == AF_INET)
		return 1;
	barrier();
	a = ctx->remote_ip6[0];
	b = ctx->remote_ip6[1];
	c = ctx->remote_ip6[2];
	return a == 0 && b == 0 && c == bpf_htonl(0xffff);
}

/* Loopback, unspecified, or the socket's own address: never leaves the host, so it is not captured. */
static __always_inline int to_own_address(struct bpf_sock_ops *ctx, int ipv4)
{
	__u32 r0, r1, r2, r3, l0, l1, l2, l3;

	if (ipv4) {
		barrier();
		r0 = ctx->remote_ip4;
		barrier();
		l0 = ctx->local_ip4;
		barrier();
		return (bpf_ntohl(r0) >> 24) == 127 || r0 == l0 || r0 == 0;
	}
	barrier();
	r0 = ctx->remote_ip6[0];
	r1 = ctx->remote_ip6[1];
	r2 = ctx->remote_ip6[2];
	r3 = ctx->remote_ip6[3];
	barrier();
	l0 = ctx->local_ip6[0];
	l1 = ctx->local_ip6[1];
	l2 = ctx->local_ip6[2];
	l3 = ctx->local_ip6[3];
	if (r0 == 0 && r1 == 0 && r2 == 0 && (r3 == bpf_htonl(1) || r3 == 0))
		return 1;
	return r0 == l0 && r1 == l1 && r2 == l2 && r3 == l3;
}

/* A SYN that waits is about to be sent again. Under `open` it goes straight on when the proxy is gone: the new mark
 * drops the route of the old one. */
static __always_inline void release_waiting(struct bpf_sock_ops *ctx, __u32 mark)
{
	int ipv4;

	if (cfg.mode_out != MODE_OPEN || without(CURE_RELEASE))
		return;
	if (ctx->state != BPF_TCP_SYN_SENT || role_of(mark) != ROLE_OUT)
		return;
	ipv4 = speaks_ipv4(ctx);
	if (is_alive(!ipv4))
		return;
	set_mark(ctx, mark, ROLE_NONE);
	count(COUNT_OUT_RELEASED);
}

static __always_inline void decide(struct bpf_sock_ops *ctx, struct bpf_sock *sk, __u32 mark)
{
	__u32 *found = bpf_sk_storage_get(&makers, sk, 0, 0), maker = 0;
	int ipv4;

	if (found)
		maker = *found; /* 0: made before the capture */
	if (maker & MAKER_PROXYS_USER) {
		/* A dial from the inbound range is one in a client's name, whether or not the proxy may set marks
		 * (before 5.17 that takes CAP_NET_ADMIN). From a port of neither range it is an app's, which happens to run
		 * as the proxy's user. */
		__u32 port = ctx->local_port;
		int to_app = port >= cfg.dial_in_first && port <= cfg.dial_in_last;
		if (to_app || cfg.trust_user || (port >= cfg.dial_out_first && port <= cfg.dial_out_last)) {
			if (to_app && role_of(mark) == ROLE_NONE)
				set_mark(ctx, mark, ROLE_DIAL);
			count(COUNT_OUT_PROXY);
			return;
		}
		maker &= ~MAKER_PROXYS_USER;
	}
	ipv4 = speaks_ipv4(ctx);
	if (to_own_address(ctx, ipv4) && !without(CURE_OWN_ADDRESS)) {
		set_mark(ctx, mark, ROLE_NONE);
		count(COUNT_OUT_OWN);
		return;
	}
	if (!is_selected(ctx, maker, ipv4)) {
		set_mark(ctx, mark, ROLE_NONE); /* the capture that this one replaces may have marked it */
		count(COUNT_OUT_EXCLUDED);
		return;
	}
	if (cfg.mode_out == MODE_OPEN)
		bpf_sock_ops_cb_flags_set(ctx, BPF_SOCK_OPS_RTO_CB_FLAG);
	if (cfg.mode_out != MODE_HOLD && !is_alive(!ipv4)) {
		if (cfg.mode_out == MODE_OPEN) {
			set_mark(ctx, mark, ROLE_NONE);
			count(COUNT_OUT_OPEN);
			return;
		}
		/* An unreachable route binds only sockets without a device: IPv4 takes a failed lookup with a device
		 * for "on link", IPv6 skips the route. Bound sockets are reset on lo instead. */
		set_mark(ctx, mark, sk->bound_dev_if && !without(CURE_GUARD) ? ROLE_CLOSED_BOUND : ROLE_CLOSED);
		count(COUNT_OUT_CLOSED);
		return;
	}
	set_mark(ctx, mark, ROLE_OUT);
	count(COUNT_OUT_CAPTURED);
}

/* Attached to the cgroup; TCP_CONNECT_CB runs in tcp_connect(), after the source address and port were chosen by the
 * ordinary route and before the SYN leaves. The return value is not used. 5.10. */
SEC("sockops")
int pln_sockops(struct bpf_sock_ops *ctx)
{
	__u32 op = ctx->op;
	struct bpf_sock *sk;
	__u32 mark;

	if (op != BPF_SOCK_OPS_TCP_CONNECT_CB && op != BPF_SOCK_OPS_RTO_CB)
		return 1;
	sk = ctx->sk;
	if (!sk)
		return 1;
	mark = sk->mark;
	if (op == BPF_SOCK_OPS_RTO_CB)
		release_waiting(ctx, mark);
	else
		decide(ctx, sk, mark);
	return 1;
}

/* ------------------------------------------------------------------ lo: between the app and the proxy */

/* From here on the app's packet says "to the proxy". What answers it without a socket of its own (a TIME_WAIT, a SYN
 * cookie) takes the mark of what it answers, and the accepted socket takes that of the SYN (tcp_fwmark_accept). With
 * ROLE_OUT such an answer would be looked up here again; an app bound to a device cannot be seen from lo, and its
 * answer would go to our own listener. */
static __always_inline void to_proxy(struct __sk_buff *skb)
{
	if (!without(CURE_DIRECTION))
		skb->mark = with_role(skb->mark, ROLE_REPLY);
}

/* No listener: a SYN waits for its retransmission (`hold`; under `open` and `closed` this is a proxy that died since
 * the connect), anything else learns at once that nobody is there. */
static __always_inline int no_listener(struct __sk_buff *skb, struct scratch *s)
{
	set_alive(s->p.v6, 0);
	if (is_syn(&s->p) || (s->p.flags & TCP_RST)) {
		count(COUNT_LO_HELD);
		return TC_ACT_SHOT;
	}
	count(COUNT_LO_RESET);
	return reset_in_place(skb, s) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

static __always_inline int app_to_proxy(struct __sk_buff *skb, struct scratch *s)
{
	int syn = is_syn(&s->p), unseen = to_link_local(&s->p) && !without(CURE_LINK_LOCAL);
	struct bpf_sock *listener;
	__u32 state;

	if (unseen && !syn) {
		to_proxy(skb);
		return TC_ACT_UNSPEC;
	}
	state = unseen ? 0 : lookup_state(skb, &s->p);
	if (state == BPF_TCP_TIME_WAIT && syn && !without(CURE_TIME_WAIT)) {
		count(COUNT_LO_CHALLENGED);
		if (settle_time_wait(skb, s, BEHIND_LO))
			return TC_ACT_SHOT;
		to_proxy(skb); /* not before: a copy of the SYN is still ROLE_OUT */
		return TC_ACT_UNSPEC;
	}
	/* A listener that is found is somebody's wildcard listener on the same port number: not meant. Any other socket
	 * is the proxy's end of this very connection, or what is left of an earlier one: the kernel knows what to do. */
	if (state && state != BPF_TCP_LISTEN &&
	    !(syn && state != TCP_NEW_SYN_RECV && state != BPF_TCP_TIME_WAIT && without(CURE_LEFTOVER)) &&
	    !(syn && state == BPF_TCP_TIME_WAIT)) {
		to_proxy(skb);
		if (syn)
			count(COUNT_LO_PASSED);
		return TC_ACT_UNSPEC;
	}
	if (!syn && without(CURE_NO_SOCKET))
		return TC_ACT_UNSPEC;
	listener = proxy_listener(skb, s->p.v6, cfg.port_out);
	if (!listener)
		return no_listener(skb, s);
	to_proxy(skb);
	if (bpf_sk_assign(skb, listener, 0)) {
		/* Nobody else may have it. A repeated SYN tries again. */
		bpf_sk_release(listener);
		count(COUNT_LO_ERROR);
		return TC_ACT_SHOT;
	}
	bpf_sk_release(listener);
	if (syn)
		count(COUNT_LO_ASSIGNED);
	return TC_ACT_UNSPEC;
}

/* The app's packet on a connection that the proxy dialled in a client's name. Where the proxy's socket is gone, nobody
 * would tell the app: the kernel's reset has a foreign source and is not routed. */
static __always_inline int app_to_dialler(struct __sk_buff *skb, struct scratch *s)
{
	if (to_link_local(&s->p) && !without(CURE_LINK_LOCAL))
		return TC_ACT_UNSPEC;
	if (lookup_state(skb, &s->p) || (s->p.flags & TCP_RST) || without(CURE_NO_SOCKET))
		return TC_ACT_UNSPEC;
	count(COUNT_LO_RESET);
	return reset_in_place(skb, s) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

/* Attached to the ingress of lo (clsact or tcx). Returns UNSPEC, so that later filters run, or SHOT. Unmarked packets
 * pass unread. 5.10. */
SEC("tc")
int pln_lo(struct __sk_buff *skb)
{
	__u32 role = role_of(skb->mark);
	struct scratch *s;

	if (role == ROLE_NONE || role == ROLE_PROXY || role == ROLE_CLOSED)
		return TC_ACT_UNSPEC;
	if (role == ROLE_REPLY) {
		/* Proxy to app. A reset with which the app's end answers takes this packet's mark (fwmark_reflect): with
		 * ROLE_OUT it comes back to the proxy, else it would leave for the real server. */
		if (!without(CURE_REFLECT))
			skb->mark = with_role(skb->mark, ROLE_OUT);
		return TC_ACT_UNSPEC;
	}
	if (role == ROLE_DIAL) {
		/* Proxy to app, in a client's name: only the direction is written down. On every packet: behind a SYN
		 * cookie it is the ACK that makes the app's socket, and that socket's answers must carry it. */
		skb->mark = with_role(skb->mark, ROLE_DIAL_REPLY);
		return TC_ACT_UNSPEC;
	}
	s = get_scratch();
	if (!s)
		return TC_ACT_SHOT; /* cannot be: one entry, key 0 */
	if (parse(skb, s, ETH_HLEN) != PARSED)
		return TC_ACT_UNSPEC; /* not TCP: an ICMP error that took our mark */
	if (role == ROLE_CLOSED_BOUND) {
		if (s->p.flags & TCP_RST)
			return TC_ACT_SHOT; /* a reset is never answered */
		count(COUNT_LO_RESET);
		return reset_in_place(skb, s) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
	}
	if (role == ROLE_DIAL_REPLY)
		return app_to_dialler(skb, s);
	return app_to_proxy(skb, s);
}

/* ------------------------------------------------------------------ a NIC: in */

/* What a SYN from outside meets. Copied out of the socket, which is released: only numbers leave the function. */
struct target {
	__u32 state;  /* 0: nothing */
	__u32 mark;   /* of a full socket */
	__u32 maker;  /* enum maker, 0: made before the capture, or by somebody else */
};

static __always_inline struct target find_target(struct __sk_buff *skb, struct packet *p)
{
	struct target t = {};
	struct bpf_sock *sk = lookup(skb, p), *full;
	__u32 *maker;

	if (!sk)
		return t;
	t.state = sk->state;
	full = bpf_sk_fullsock(sk);
	if (full) {
		t.mark = full->mark;
		maker = bpf_sk_storage_get(&makers, full, 0, 0);
		if (maker)
			t.maker = *maker;
	}
	bpf_sk_release(sk);
	return t;
}

/* Is it a listener of the app's? */
static __always_inline int is_apps(struct target *t, __u16 dport)
{
	__u32 port = bpf_ntohs(dport), maker = t->maker;

	if (maker & MAKER_PROXYS_USER) {
		if (cfg.trust_user || port == cfg.port_out || port == cfg.port_in || port == cfg.port_in_own || port == cfg.port_admin ||
		    port == cfg.port_health)
			return 0;
		maker &= ~MAKER_PROXYS_USER;
	}
	return maker == MAKER_APP || maker == MAKER_APP_UNSELECTED;
}

static __always_inline int refuse(struct __sk_buff *skb, struct scratch *s, __u32 l2)
{
	if (reply_reset(skb, s, l2))
		return TC_ACT_SHOT;
	return bpf_redirect(skb->ifindex, 0);
}

static __always_inline int no_inbound_listener(struct __sk_buff *skb, struct scratch *s, __u32 l2)
{
	if (!is_syn(&s->p))
		return TC_ACT_UNSPEC;
	if (cfg.mode_in == MODE_OPEN) {
		count(COUNT_IN_OPEN);
		return TC_ACT_UNSPEC;
	}
	if (cfg.mode_in == MODE_CLOSED) {
		count(COUNT_IN_CLOSED);
		return refuse(skb, s, l2);
	}
	count(COUNT_IN_HELD); /* the client's retransmission finds the proxy, or is held again */
	return TC_ACT_SHOT;
}

static __always_inline int client_is_selected(struct packet *p)
{
	__u32 *a = p->tuple.ipv6.saddr;

	if (!lets_port_in(SELECT_IN_PORT, bpf_ntohs(p->dport)))
		return 0;
	if (p->v6)
		return lets_ipv6_in(SELECT_IN_ADDRESS, a[0], a[1], a[2], a[3]);
	return lets_ipv4_in(SELECT_IN_ADDRESS, p->tuple.ipv4.saddr);
}

static __always_inline int inbound(struct __sk_buff *skb, __u32 l2)
{
	struct scratch *s = get_scratch();
	struct bpf_sock *listener;
	struct target t;
	int parsed, syn;
	__u32 port;

	if (!s)
		return TC_ACT_SHOT; /* cannot be */
	parsed = parse(skb, s, l2);
	if (parsed == NOT_TCP)
		return TC_ACT_UNSPEC;
	/* A socket assigned to a first fragment is lost in reassembly, and the app's own listener would answer: anyone
	 * outside could pass by the sidecar. No TCP fragments its SYN. */
	if (parsed == HEADER_CUT || (s->p.fragment && (s->p.flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)) {
		if (without(CURE_FRAGMENT))
			return TC_ACT_UNSPEC;
		count(COUNT_IN_FRAGMENT);
		return TC_ACT_SHOT;
	}
	if (s->p.flags & TCP_RST)
		return TC_ACT_UNSPEC;
	syn = is_syn(&s->p);
	t = find_target(skb, &s->p);
	if (!t.state)
		return TC_ACT_UNSPEC; /* nobody listens: the kernel refuses, as ever */
	if (t.state == BPF_TCP_TIME_WAIT && syn && !without(CURE_TIME_WAIT)) {
		count(COUNT_IN_CHALLENGED);
		return settle_time_wait(skb, s, BEHIND_NIC) ? TC_ACT_SHOT : TC_ACT_UNSPEC;
	}
	if (t.state != BPF_TCP_LISTEN) {
		/* A client's SYN from the very port of a dial in its name. Nobody can serve it; a reset beats a hang. */
		if (syn && role_of(t.mark) == ROLE_DIAL_REPLY && !without(CURE_COLLISION)) {
			count(COUNT_IN_COLLISION);
			return refuse(skb, s, l2);
		}
		return TC_ACT_UNSPEC;
	}
	if (!is_apps(&t, s->p.dport)) {
		if (syn)
			count(COUNT_IN_FOREIGN);
		return TC_ACT_UNSPEC;
	}
	if (!client_is_selected(&s->p)) {
		if (syn)
			count(COUNT_IN_EXCLUDED);
		return TC_ACT_UNSPEC;
	}
	if (!syn && without(CURE_NO_SOCKET))
		return TC_ACT_UNSPEC;
	if (!without(CURE_FORWARDED) && is_forwarded(skb, s)) {
		if (syn)
			count(COUNT_IN_FORWARDED);
		return TC_ACT_UNSPEC;
	}
	/* The answers of a listener with a mark of its own do not come back to a dial in the client's name. */
	port = cfg.port_in;
	if (with_role(t.mark, ROLE_NONE) && !without(CURE_MARKED_LISTENER))
		port = cfg.port_in_own;
	listener = proxy_listener(skb, s->p.v6, port);
	if (!listener)
		return no_inbound_listener(skb, s, l2);
	if (bpf_sk_assign(skb, listener, 0)) {
		bpf_sk_release(listener);
		count(COUNT_IN_ERROR);
		return TC_ACT_SHOT; /* never past the sidecar */
	}
	bpf_sk_release(listener);
	count(syn ? COUNT_IN_ASSIGNED : COUNT_IN_COOKIE);
	return TC_ACT_UNSPEC;
}

/* Attached to the ingress of every interface with an Ethernet header but lo. Returns UNSPEC, SHOT or a redirect. 5.10. */
SEC("tc")
int pln_in(struct __sk_buff *skb)
{
	return inbound(skb, ETH_HLEN);
}

/* The same for interfaces without a link header: tun, wireguard, ipip. */
SEC("tc")
int pln_in_l3(struct __sk_buff *skb)
{
	return inbound(skb, 0);
}

/* In place of the two above where the selection leaves an interface alone. What goes out by it is guarded all the same. */
SEC("tc")
int pln_pass(struct __sk_buff *skb)
{
	return TC_ACT_UNSPEC;
}

/* ------------------------------------------------------------------ a NIC: out */

/* Attached to the egress of every interface but lo. What carries the mark of a captured connection must reach lo; on its
 * way out, a route, a rule or an address was taken away. Dropped, not passed: a capture never becomes a silent bypass, of
 * a connection's beginning or of what is sent on it later, in either direction. 5.10. */
SEC("tc")
int pln_out(struct __sk_buff *skb)
{
	__u32 role = role_of(skb->mark);

	if (role == ROLE_NONE || role == ROLE_PROXY)
		return TC_ACT_UNSPEC;
	if (without(CURE_GUARD))
		return TC_ACT_UNSPEC;
	count(COUNT_GUARDED);
	return TC_ACT_SHOT;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
