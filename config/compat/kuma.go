// SPDX-License-Identifier: Apache-2.0

package compat

import (
	"errors"
	"net/netip"
	"regexp"
	"strings"

	"github.com/pillionproxy/pillion/config"
)

// kuma reads the environment of `kumactl install transparent-proxy` and the annotations of pods.
func kuma() *system {
	const (
		traffic = "traffic.kuma.io/"
		ports   = "kuma.io/transparent-proxying"
		env     = "KUMA_TRANSPARENT_PROXY_"
	)
	rulesOnly := "about iptables rules, which Pillion makes in its own way"
	outbound := listener("outbound-port", func(r *Result) *uint16 { return &r.Outbound })
	inbound := listener("inbound-port", func(r *Result) *uint16 { return &r.Inbound })
	perUser := refuse("inbound connections have no user until the app accepts them", "use --exclude-inbound-ports or --exclude-inbound-cidrs")
	return &system{
		annotations: map[string]handler{
			traffic + "exclude-inbound-ports":           excludeInboundPorts,
			traffic + "exclude-outbound-ports":          excludeOutboundPorts,
			traffic + "exclude-outbound-ports-for-uids": portsForUIDs,
			traffic + "exclude-inbound-ips":             excludeInboundCIDRs,
			traffic + "exclude-outbound-ips":            excludeOutboundCIDRs,
			traffic + "drop-invalid-packets":            boolean(noConntrack, asDefault),
			traffic + "iptables-logs":                   ignore("`pillion status` counts the verdicts"),
			traffic + "transparent-proxy-config":        refuse("a whole configuration in one value is not read", "give its parts as annotations or as "+env+"… variables"),
			traffic + "transparent-proxy-configmap-name": refuse("a ConfigMap is not read",
				"give its parts as annotations or as "+env+"… variables"),
			ports:                     boolean(asDefault, wantsNone),
			ports + "-inbound-port":   inbound,
			ports + "-outbound-port":  outbound,
			ports + "-ip-family-mode": familyMode,
			ports + "-ebpf":           boolean(backend("ebpf"), ignore("a backend is found by itself (--backend auto)")),
			"kuma.io/sidecar-uid":     proxyUser,
			"kuma.io/builtin-dns":     boolean(noDNS, asDefault),
		},
		variables: map[string]handler{
			env + "KUMA_DP_USER":                             proxyUser,
			env + "IP_FAMILY_MODE":                           familyMode,
			env + "REDIRECT_INBOUND_ENABLED":                 boolean(asDefault, noInbound),
			env + "REDIRECT_INBOUND_PORT":                    inbound,
			env + "REDIRECT_INBOUND_INCLUDE_PORTS":           includeInboundPorts,
			env + "REDIRECT_INBOUND_EXCLUDE_PORTS":           excludeInboundPorts,
			env + "REDIRECT_INBOUND_EXCLUDE_PORTS_FOR_IPS":   excludeInboundCIDRs,
			env + "REDIRECT_INBOUND_EXCLUDE_PORTS_FOR_UIDS":  perUser,
			env + "REDIRECT_OUTBOUND_ENABLED":                boolean(asDefault, noOutbound),
			env + "REDIRECT_OUTBOUND_PORT":                   outbound,
			env + "REDIRECT_OUTBOUND_INCLUDE_PORTS":          includeOutboundPorts,
			env + "REDIRECT_OUTBOUND_EXCLUDE_PORTS":          excludeOutboundPorts,
			env + "REDIRECT_OUTBOUND_EXCLUDE_PORTS_FOR_IPS":  excludeOutboundCIDRs,
			env + "REDIRECT_OUTBOUND_EXCLUDE_PORTS_FOR_UIDS": portsForUIDs,
			env + "REDIRECT_DNS_ENABLED":                     boolean(noDNS, asDefault),
			env + "REDIRECT_DNS_CAPTURE_ALL":                 ignore("it is for REDIRECT_DNS_ENABLED"),
			env + "REDIRECT_VNET_NETWORKS":                   emptyOnly("connections of virtual networks are not the app's, and are not captured", "leave it unset; they pass uncaptured"),
			env + "EBPF_ENABLED":                             boolean(backend("ebpf"), ignore("a backend is found by itself (--backend auto)")),
			env + "DROP_INVALID_PACKETS":                     boolean(noConntrack, asDefault),
			env + "DRY_RUN":                                  boolean(refuse("it would be installed all the same", "use `pillion init --dry-run`"), asDefault),
		},
		variablePrefixes:   []string{env},
		annotationPrefixes: []string{traffic, ports},
		harmless: []harmless{
			{regexp.MustCompile(`^KUMA_TRANSPARENT_PROXY_REDIRECT_DNS_`), "it is for REDIRECT_DNS_ENABLED"},
			{regexp.MustCompile(`^KUMA_TRANSPARENT_PROXY_EBPF_|^kuma\.io/transparent-proxying-ebpf-|^KUMA_IO_TRANSPARENT_PROXYING_EBPF_`), "Pillion's programs are in its binary, and find their places by themselves"},
			{regexp.MustCompile(`^KUMA_TRANSPARENT_PROXY_(WAIT|WAIT_INTERVAL|RETRY_\w+|LOG_\w+|COMMENTS?_\w+|IPTABLES_EXECUTABLES|EXECUTABLES\w*|STORE_FIREWALLD|CNI_MODE|VERBOSE|REDIRECT_NAME_PREFIX|REDIRECT_(IN|OUT)BOUND_(\w+_)?CHAIN_NAME|REDIRECT_INBOUND_INSERT_REDIRECT_INSTEAD_OF_APPEND)$`), rulesOnly},
			{regexp.MustCompile(`^kuma\.io/transparent-proxying-(inbound-v6-port|reachable-\w+)|^KUMA_IO_TRANSPARENT_PROXYING_(INBOUND_V6_PORT|REACHABLE_)`), "about Kuma's proxy, not about the capture"},
		},
	}
}

// familyMode leaves IPv6 alone where Kuma does.
func familyMode(r *reader, f *Finding) error {
	switch f.Value {
	case "", "dualstack", "unspecified":
		f.ignored("both families are captured always")
		return nil
	case "ipv4":
		all := []netip.Prefix{everything[1]}
		r.add(f, "exclude-outbound-cidrs", func(s *config.Selection) { s.OutboundCIDRs.Exclude = append(s.OutboundCIDRs.Exclude, all...) }, texts(all))
		r.add(f, "exclude-inbound-cidrs", func(s *config.Selection) { s.InboundCIDRs.Exclude = append(s.InboundCIDRs.Exclude, all...) }, texts(all))
		return nil
	}
	return errors.New("must be dualstack or ipv4")
}

// portsForUIDs reads <protocol:>?<ports:>?<uids>, several of them separated by semicolons. A user that is left alone
// altogether can be said; one that is on some ports alone cannot.
func portsForUIDs(r *reader, f *Finding) error {
	var users []config.IDRange
	var refused, udp []string
	for entry := range strings.SplitSeq(f.Value, ";") {
		if entry = strings.TrimSpace(entry); entry == "" {
			continue
		}
		protocol, ports, uids := "", "*", entry
		switch parts := strings.Split(entry, ":"); len(parts) {
		case 1:
		case 2:
			ports, uids = parts[0], parts[1]
			if ports == "tcp" || ports == "udp" {
				protocol, ports = ports, "*"
			}
		case 3:
			protocol, ports, uids = parts[0], parts[1], parts[2]
		default:
			return errors.New("must be PROTOCOL:PORTS:UIDS, where PROTOCOL (tcp, udp) and PORTS (a list, ranges or *) may be left out")
		}
		if protocol != "" && protocol != "*" && protocol != "tcp" && protocol != "udp" {
			return errors.New("the protocol must be tcp or udp")
		}
		ids, err := parseList(uids, config.ParseIDs)
		if err != nil {
			return err
		}
		if ports != "*" {
			if _, err := parseList(ports, config.ParsePorts); err != nil {
				return err
			}
		}
		switch {
		case protocol == "udp":
			udp = append(udp, entry)
		case ports != "*" && ports != "":
			refused = append(refused, entry)
		default:
			users = append(users, ids...)
		}
	}
	switch {
	case len(refused) > 0:
		f.refused("a port cannot be left alone for one user only ("+strings.Join(refused, "; ")+"): ports and users are judged apart",
			"use --exclude-uids for the user, or --exclude-outbound-ports for everybody")
	case len(users) > 0:
		r.add(f, "exclude-uids", func(s *config.Selection) { s.UIDs.Exclude = append(s.UIDs.Exclude, users...) }, texts(users))
	case len(udp) > 0:
		f.ignored("UDP is not captured")
	default:
		f.ignored("an empty list: nothing is meant")
	}
	return nil
}
