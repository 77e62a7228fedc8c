/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What every program of the capture needs: constants, settings, maps, and the few rules by which one object loads from
 * Linux 5.10 on with CAP_BPF and CAP_NET_ADMIN alone. Without CAP_PERFMON the verifiers of 5.10 and 6.1 also walk the
 * mispredicted branches, and take every narrow store to an 8-aligned stack address for a register spill. Hence:
 *
 *   - packets are read and written with helpers, never through data/data_end;
 *   - a 4-byte local whose address goes to a helper is a `struct word`, with a stack slot of its own;
 *   - structures with narrow fields are built in the `scratch` map, never on the stack;
 *   - a pointer is tested for NULL once, and a looked-up socket becomes a plain number in one function;
 *   - loops are unrolled, and barriers keep clang from merging accesses to the context.
 */
#ifndef PILLION_COMMON_H
#define PILLION_COMMON_H

#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/pkt_cls.h>
#include <stddef.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

/* <sys/socket.h> cannot be included for this target. */
#define AF_INET 2
#define AF_INET6 10
#define SOCK_STREAM 1
#define SOL_SOCKET 1
#define SO_MARK 36

#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd
#define ETH_HLEN 14

#define LOOPBACK4 0x7f000001

/* A state that linux/bpf.h does not name: a request socket, between SYN and the last ACK of the handshake. */
#define TCP_NEW_SYN_RECV 12

#define barrier() asm volatile("" ::: "memory")
/* Keeps clang from making one store out of the same store in two branches: the text must differ. */
#define apart(text) asm volatile("# " text ::: "memory")

/* config.Role: three bits of the mark, at cfg.shift. Every other bit of a mark is the app's or the host's. */
enum role {
	ROLE_NONE = 0,
	ROLE_OUT = 1,          /* the app's captured connection */
	ROLE_CLOSED = 2,       /* under the policy closed: routed to an unreachable route */
	ROLE_PROXY = 3,        /* a dial that the proxy itself names as its own */
	ROLE_DIAL = 4,         /* the proxy's dial to the app, in the client's name */
	ROLE_DIAL_REPLY = 5,   /* the app's side of it */
	ROLE_CLOSED_BOUND = 6, /* closed, of a socket bound to a device: reset on lo */
	ROLE_REPLY = 7,        /* the proxy's answers to the app */
};

/* config.FailureMode */
enum failure_mode { MODE_HOLD = 0, MODE_OPEN = 1, MODE_CLOSED = 2 };

/* Every verdict is counted; the names of the Go side are generated from these. */
enum counter {
	COUNT_OUT_CAPTURED,      /* sockops: marked for the outbound listener */
	COUNT_OUT_OWN,           /* sockops: to an own address, left alone */
	COUNT_OUT_EXCLUDED,      /* sockops: not selected, left alone */
	COUNT_OUT_PROXY,         /* sockops: the proxy's own dial, left alone */
	COUNT_OUT_OPEN,          /* sockops: no proxy, policy open: direct */
	COUNT_OUT_CLOSED,        /* sockops: no proxy, policy closed: refused */
	COUNT_OUT_RELEASED,      /* sockops: a waiting SYN released, the proxy died under policy open */
	COUNT_OUT_MARK_CLEARED,  /* connect: a mark of an earlier, failed connect taken off */
	COUNT_LO_ASSIGNED,       /* lo: SYN given to the outbound listener */
	COUNT_LO_HELD,           /* lo: SYN dropped, no listener */
	COUNT_LO_PASSED,         /* lo: SYN of a 4-tuple that has a socket: the kernel's */
	COUNT_LO_CHALLENGED,     /* lo: SYN that met a TIME_WAIT, turned into a challenge */
	COUNT_LO_RESET,          /* lo: packet without a socket answered by a reset */
	COUNT_LO_ERROR,          /* lo: assigning failed, dropped */
	COUNT_IN_ASSIGNED,       /* in: SYN given to the inbound listener */
	COUNT_IN_HELD,           /* in: SYN dropped, no listener, policy hold */
	COUNT_IN_OPEN,           /* in: SYN passed to the app, no listener, policy open */
	COUNT_IN_CLOSED,         /* in: SYN answered by a reset, no listener, policy closed */
	COUNT_IN_CHALLENGED,     /* in: SYN that met a TIME_WAIT */
	COUNT_IN_COOKIE,         /* in: last ACK of a handshake by SYN cookie, given to the listener */
	COUNT_IN_FORWARDED,      /* in: SYN for another host, left alone */
	COUNT_IN_FOREIGN,        /* in: SYN for a listener outside the cgroup, left alone */
	COUNT_IN_EXCLUDED,       /* in: SYN that is not selected, left alone */
	COUNT_IN_COLLISION,      /* in: SYN from the port of a dial in its name, reset */
	COUNT_IN_FRAGMENT,       /* in: SYN in fragments, dropped */
	COUNT_IN_ERROR,          /* in: assigning failed, dropped */
	COUNT_GUARDED,           /* out: marked packet about to leave by a real interface, dropped */
	COUNT_MAX,
};

/*
 * Cures that can be taken out, so that a test can show that it fails without them. All are on in production
 * (cfg.without == 0).
 */
enum cure {
	CURE_TIME_WAIT = 1 << 0,   /* a SYN that meets TIME_WAIT is turned into a challenge */
	CURE_LEFTOVER = 1 << 1,    /* a SYN that meets any other socket is left to the kernel */
	CURE_STALE_MARK = 1 << 2,  /* connect clears the mark of an earlier connect */
	CURE_RELEASE = 1 << 3,     /* waiting SYNs are released under open */
	CURE_NO_SOCKET = 1 << 4,   /* packets without a socket reach the listener or are reset */
	CURE_FORWARDED = 1 << 5,   /* forwarded packets are left alone */
	CURE_OWN_ADDRESS = 1 << 6, /* own addresses are left alone */
	CURE_DIRECTION = 1 << 7,   /* the app's packets carry ROLE_REPLY from lo on */
	CURE_REFLECT = 1 << 8,     /* the proxy's answers carry ROLE_OUT from lo on */
	CURE_LINK_LOCAL = 1 << 9,  /* link-local ends are assigned unseen */
	CURE_MARKED_LISTENER = 1 << 10, /* app listeners with a mark go to the second inbound listener */
	CURE_GUARD = 1 << 11,      /* marked packets never leave; closed holds for bound sockets */
	CURE_FRAGMENT = 1 << 12,   /* fragmented SYNs are dropped */
	CURE_COLLISION = 1 << 13,  /* a client's own port used in its name is answered by a reset */
};

/* The dimensions of config.Selection as select.h asks for them; a set of them, or the kind of a key. */
enum select_kind {
	SELECT_OUT_ADDRESS = 1 << 0, /* 16 bytes, or 4: the destination */
	SELECT_IN_ADDRESS = 1 << 1,  /* the same: the client */
	SELECT_OUT_PORT = 1 << 2,    /* 2 bytes, network order: the destination's */
	SELECT_IN_PORT = 1 << 3,     /* 2 bytes: the app's */
	SELECT_UID = 1 << 4,         /* 4 bytes, network order: who makes the socket */
	SELECT_GID = 1 << 5,         /* 4 bytes */
	SELECT_CGROUP = 1 << 6,      /* 8 bytes, host order: its id; exclusions only */
	SELECT_IPV4 = 1 << 7,        /* beside the two of addresses, in keys alone: 4 bytes. No IPv6 prefix covers it */
};

/* Written by the loader before the load, constant from then on. */
struct settings {
	__u32 shift;         /* lowest of the three mark bits */
	enum failure_mode mode_out;
	enum failure_mode mode_in;
	__u32 proxy_uid;     /* sockets that this user makes are the proxy's, if their ports are */
	__u32 trust_user;    /* all of them are, whatever their ports: another's proxy */
	__u32 port_out;      /* the proxy's listeners, host order, on 127.0.0.1 and ::1 */
	__u32 port_in;
	__u32 port_in_own;
	__u32 port_admin;    /* those at which the proxy itself is asked */
	__u32 port_health;
	__u32 dial_out_first; /* source ports of the proxy's dials for the app */
	__u32 dial_out_last;
	__u32 dial_in_first; /* source ports of the proxy's dials to the app */
	__u32 dial_in_last;
	enum select_kind selects;  /* dimensions of the selection with entries */
	enum select_kind includes; /* dimensions that let in only what is included */
	enum cure without;   /* those taken out */
};
volatile const struct settings cfg;

#define without(cure) (cfg.without & (cure))

/* A 4-byte value on the stack whose address goes to a helper. */
struct word {
	__u32 pad, v;
} __attribute__((aligned(8)));

/* enum counter -> count. Written by all programs, read by `pillion status`. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNT_MAX);
	__type(key, enum counter);
	__type(value, __u64);
} counters SEC(".maps");

/* 0: IPv4, 1: IPv6 -> 1 while the outbound listener was there at the last look. Written by connect4/6 and lo, read by
 * sockops, which has no lookup helper. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, __u32);
} alive SEC(".maps");

/* socket -> enum maker. Written where sockets are made, read by sockops and tc; freed with the socket. */
enum maker {
	MAKER_APP = 1,
	MAKER_APP_UNSELECTED = 2, /* of a user or group that is not selected: its outbound connections are left alone */
	MAKER_EXCLUDED = 3,       /* in an excluded cgroup: left alone in both directions */
	MAKER_PROXYS_USER = 1 << 2, /* beside one of those: the proxy's, if it has a port of the proxy's */
};
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, enum maker);
} makers SEC(".maps");

static __always_inline void count(__u32 which)
{
	struct word key;
	key.v = which;
	__u64 *n = bpf_map_lookup_elem(&counters, &key.v);
	if (n)
		(*n)++;
}

static __always_inline __u32 role_of(__u32 mark)
{
	return (mark >> cfg.shift) & 7;
}

/* The mark with our three bits replaced. */
static __always_inline __u32 with_role(__u32 mark, __u32 role)
{
	return (mark & ~(7u << cfg.shift)) | (role << cfg.shift);
}

static __always_inline void set_alive(__u32 v6, __u32 value)
{
	struct word key;
	key.v = v6;
	__u32 *a = bpf_map_lookup_elem(&alive, &key.v);
	if (a)
		*a = value;
}

static __always_inline __u32 is_alive(__u32 v6)
{
	struct word key;
	key.v = v6;
	__u32 *a = bpf_map_lookup_elem(&alive, &key.v);
	return a && *a;
}

/*
 * The proxy's listener of a family on a port, or NULL. It is found by asking the kernel, never remembered: right after
 * SIGKILL, for a proxy older than these programs, and for one outside the cgroup. The caller releases it.
 */
static __always_inline struct bpf_sock *proxy_listener(void *ctx, __u32 v6, __u32 port)
{
	struct bpf_sock_tuple t = {};
	struct bpf_sock *sk;

	if (v6) {
		t.ipv6.daddr[3] = bpf_htonl(1);
		t.ipv6.dport = bpf_htons(port);
		sk = bpf_skc_lookup_tcp(ctx, &t, sizeof(t.ipv6), BPF_F_CURRENT_NETNS, 0);
	} else {
		t.ipv4.daddr = bpf_htonl(LOOPBACK4);
		t.ipv4.dport = bpf_htons(port);
		sk = bpf_skc_lookup_tcp(ctx, &t, sizeof(t.ipv4), BPF_F_CURRENT_NETNS, 0);
	}
	if (sk && sk->state != BPF_TCP_LISTEN) {
		bpf_sk_release(sk);
		return NULL;
	}
	return sk;
}

#endif
