// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// format says how the value of an attribute is written.
type format int

const (
	asHex  format = iota
	asU32         // unsigned, 32 bits
	asMark        // the same, in hexadecimal
	asIP
	asText
	asDevice
	omitted // changes by itself
)

type attribute struct {
	name   string
	format format
}

// The attributes of include/uapi/linux/fib_rules.h, rtnetlink.h and pkt_sched.h that have a name here. Others are
// written by number.
var (
	ruleAttributes = map[uint16]attribute{
		nl.FRA_DST: {"to", asIP}, nl.FRA_SRC: {"from", asIP}, nl.FRA_IIFNAME: {"iif", asText}, nl.FRA_OIFNAME: {"oif", asText},
		nl.FRA_PRIORITY: {"priority", asU32}, nl.FRA_FWMARK: {"fwmark", asMark}, nl.FRA_FWMASK: {"fwmask", asMark},
		nl.FRA_TABLE: {"table", asU32}, nl.FRA_SUPPRESS_PREFIXLEN: {"suppress_prefixlength", asHex},
	}
	routeAttributes = map[uint16]attribute{
		unix.RTA_DST: {"to", asIP}, unix.RTA_SRC: {"from", asIP}, unix.RTA_OIF: {"dev", asDevice}, unix.RTA_GATEWAY: {"via", asIP},
		unix.RTA_PRIORITY: {"metric", asU32}, unix.RTA_PREFSRC: {"src", asIP}, unix.RTA_TABLE: {"table", asU32},
		unix.RTA_CACHEINFO: {"cache", omitted},
	}
	tcAttributes = map[uint16]attribute{
		nl.TCA_KIND: {"kind", asText}, nl.TCA_STATS: {"stats", omitted}, nl.TCA_STATS2: {"stats2", omitted},
		nl.TCA_XSTATS: {"xstats", omitted},
	}
)

// ruleText writes a rule: struct fib_rule_hdr, then attributes.
func ruleText(b []byte) (string, error) {
	if len(b) < unix.SizeofRtMsg {
		return "", fmt.Errorf("a rule of %d bytes", len(b))
	}
	head := fmt.Sprintf("%s rule to/%d from/%d tos=%d action=%d flags=%#x", familyText(b[0]), b[1], b[2], b[3], b[7],
		binary.NativeEndian.Uint32(b[8:]))
	return withAttributes(head, b[unix.SizeofRtMsg:], ruleAttributes, nil)
}

// routeText writes a route: struct rtmsg, then attributes.
func routeText(b []byte, names map[uint32]string) (string, error) {
	if len(b) < unix.SizeofRtMsg {
		return "", fmt.Errorf("a route of %d bytes", len(b))
	}
	head := fmt.Sprintf("%s route to/%d from/%d tos=%d protocol=%d scope=%d type=%d", familyText(b[0]), b[1], b[2], b[3], b[5],
		b[6], b[7])
	return withAttributes(head, b[unix.SizeofRtMsg:], routeAttributes, names)
}

// tcText writes a qdisc or a filter: struct tcmsg, then attributes.
func tcText(b []byte, names map[uint32]string) (string, error) {
	if len(b) < nl.SizeofTcMsg {
		return "", fmt.Errorf("a tc object of %d bytes", len(b))
	}
	m := nl.DeserializeTcMsg(b)
	head := fmt.Sprintf("dev=%s handle=%#x parent=%#x info=%#x", names[uint32(m.Ifindex)], m.Handle, m.Parent, m.Info)
	return withAttributes(head, b[nl.SizeofTcMsg:], tcAttributes, names)
}

func withAttributes(head string, b []byte, known map[uint16]attribute, names map[uint32]string) (string, error) {
	attrs, err := nl.ParseRouteAttr(b)
	if err != nil {
		return "", err
	}
	var s strings.Builder
	s.WriteString(head)
	for _, a := range attrs {
		kind := a.Attr.Type &^ unix.NLA_F_NESTED
		at, ok := known[kind]
		if !ok {
			at.name = fmt.Sprintf("attribute%d", kind)
		}
		if at.format != omitted {
			fmt.Fprintf(&s, " %s=%s", at.name, valueText(a.Value, at.format, names))
		}
	}
	return s.String(), nil
}

func valueText(v []byte, f format, names map[uint32]string) string {
	switch {
	case f == asU32 && len(v) == 4:
		return fmt.Sprint(binary.NativeEndian.Uint32(v))
	case f == asMark && len(v) == 4:
		return fmt.Sprintf("%#x", binary.NativeEndian.Uint32(v))
	case f == asDevice && len(v) == 4:
		return names[binary.NativeEndian.Uint32(v)]
	case f == asText:
		return strings.TrimRight(string(v), "\x00")
	case f == asIP:
		if addr, ok := netip.AddrFromSlice(v); ok {
			return addr.String()
		}
	}
	return hex.EncodeToString(v)
}

func familyText(family byte) string {
	if family == unix.AF_INET {
		return "inet"
	}
	return "inet6"
}
