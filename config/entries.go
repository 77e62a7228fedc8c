// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// The entries of a Selection, as flags and annotations write them: comma separated, and a flag may be given repeatedly.

// ParsePorts reads ports and ranges of them: 80,443,8000-8999. Port 0 is a port here: it can be dialled.
func ParsePorts(s string) ([]PortRange, error) {
	return entries(s, func(s string) (PortRange, error) {
		first, last, err := bounds(s, math.MaxUint16)
		if err != nil {
			return PortRange{}, fmt.Errorf("%q is neither a port nor a range of ports: write 80 or 8000-8999, from 0 to 65535", s)
		}
		return PortRange{uint16(first), uint16(last)}, nil
	})
}

// ParseIDs reads numeric user or group ids and ranges of them.
func ParseIDs(s string) ([]IDRange, error) {
	return entries(s, func(s string) (IDRange, error) {
		first, last, err := bounds(s, math.MaxUint32-1) // the last one means "none" (setuid(2))
		if err != nil {
			return IDRange{}, fmt.Errorf("%q is neither a numeric id nor a range of ids: write 1000 or 1000-1999 (`id -u NAME` tells a user's)", s)
		}
		return IDRange{uint32(first), uint32(last)}, nil
	})
}

// ParseCIDRs reads prefixes and single addresses of both families.
func ParseCIDRs(s string) ([]netip.Prefix, error) { return entries(s, parseCIDR) }

func parseCIDR(s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		if a.Zone() != "" {
			return netip.Prefix{}, fmt.Errorf("%q: an address with a zone cannot be matched; use the interfaces' flags", s)
		}
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		return p, fmt.Errorf("%q is neither an address nor a prefix: write 10.0.0.0/8 or fd00::/8", s)
	case p.Addr().Is4In6():
		return p, fmt.Errorf("%q is an IPv4-mapped prefix: write it as IPv4", s)
	case p != p.Masked():
		return p, fmt.Errorf("%q has bits behind its length: did you mean %s?", s, p.Masked())
	}
	return p, nil
}

// ParseInterfaces reads interface names; a * at the end stands for any rest.
func ParseInterfaces(s string) ([]InterfaceName, error) {
	return entries(s, func(s string) (InterfaceName, error) {
		// dev_valid_name in net/core/dev.c; a pattern is shorter than what it matches
		bad := len(s) > 15 && !strings.HasSuffix(s, "*") || len(s) > 16 || s == "." || s == ".." || strings.ContainsAny(s, "/: \t\n+!\"'")
		if bad || strings.Contains(strings.TrimSuffix(s, "*"), "*") {
			return "", fmt.Errorf("%q is no interface name: write eth0, or veth* for all that begin so", s)
		}
		return InterfaceName(s), nil
	})
}

// entries reads a list. It reports every wrong entry at once; spaces around one do not count.
func entries[T any](s string, parse func(string) (T, error)) ([]T, error) {
	var list []T
	var errs []error
	for field := range strings.SplitSeq(s, ",") {
		field = strings.TrimSpace(field)
		if field == "" {
			errs = append(errs, fmt.Errorf("%q has an empty entry", s))
			continue
		}
		v, err := parse(field)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		list = append(list, v)
	}
	return list, errors.Join(errs...)
}

var errBounds = errors.New("not a range")

// bounds reads N or FIRST-LAST, both from 0 to most.
func bounds(s string, most uint64) (first, last uint64, err error) {
	a, b, isRange := strings.Cut(s, "-")
	if !isRange {
		b = a
	}
	first, err1 := strconv.ParseUint(a, 10, 64)
	last, err2 := strconv.ParseUint(b, 10, 64)
	if err1 != nil || err2 != nil || last > most || last < first {
		return 0, 0, errBounds
	}
	return first, last, nil
}

// IDRange is an inclusive range of user or group ids.
type IDRange struct{ First, Last uint32 }

// Contains reports whether the id lies in the range.
func (r IDRange) Contains(id uint32) bool { return id >= r.First && id <= r.Last }

func (r IDRange) String() string {
	if r.First == r.Last {
		return strconv.FormatUint(uint64(r.First), 10)
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// MarshalText writes the range as ParseIDs reads it, for JSON.
func (r IDRange) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (r *IDRange) UnmarshalText(b []byte) error {
	first, last, err := bounds(string(b), math.MaxUint32-1)
	*r = IDRange{uint32(first), uint32(last)}
	return err
}

// InterfaceName is the name of an interface, or the beginning of one and a *.
type InterfaceName string

// Matches reports whether the interface is meant.
func (n InterfaceName) Matches(name string) bool {
	if begin, ok := strings.CutSuffix(string(n), "*"); ok {
		return strings.HasPrefix(name, begin)
	}
	return string(n) == name
}

func (n InterfaceName) String() string { return string(n) }

// Merged sorts ranges of ports and joins those that touch, for backends that pay per entry.
func Merged(ranges []PortRange) []PortRange {
	ranges = slices.SortedFunc(slices.Values(ranges), func(a, b PortRange) int { return int(a.First) - int(b.First) })
	var out []PortRange
	for _, r := range ranges {
		if n := len(out); n > 0 && int(r.First) <= int(out[n-1].Last)+1 {
			out[n-1].Last = max(out[n-1].Last, r.Last)
			continue
		}
		out = append(out, r)
	}
	return out
}
