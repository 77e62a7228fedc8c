// SPDX-License-Identifier: Apache-2.0

package compat

import (
	"errors"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/pillionproxy/pillion/config"
)

// Keys of what is judged together.
const (
	keyInboundInclude  = "inbound include"
	keyInboundExclude  = "inbound exclude"
	keyOutboundPorts   = "outbound ports"
	keyOutboundRanges  = "outbound ranges"
	keyGroupsInclude   = "groups include"
	keyGroupsExclude   = "groups exclude"
	istioProxyOnly     = "about Istio's proxy, not about the capture"
	istioRuleOnly      = "about iptables rules, which Pillion makes in its own way"
	istioAnnotations   = "traffic.sidecar.istio.io/"
	istioOtherSettings = "sidecar.istio.io/"
)

// istio reads what istio-iptables does, and the annotations that make its arguments.
func istio() *system {
	outbound := listener("outbound-port", func(r *Result) *uint16 { return &r.Outbound })
	inbound := listener("inbound-port", func(r *Result) *uint16 { return &r.Inbound })
	virtual := emptyOnly("connections of virtual machines inside the pod are not the pod's own, and are not captured",
		"leave it unset; such connections pass uncaptured")
	return &system{
		variables: map[string]handler{
			"ENVOY_PORT":                          outbound,
			"INBOUND_CAPTURE_PORT":                inbound,
			"INBOUND_TUNNEL_PORT":                 ignore("tunnels end at Istio's proxy"),
			"PROXY_UID":                           proxyUser,
			"PROXY_GID":                           excludeGIDs,
			"ENVOY_USER":                          refuse("a user is known by its number here", "unset it and set PROXY_UID, or --proxy-uid"),
			"ISTIO_INBOUND_INTERCEPTION_MODE":     interceptionMode,
			"ISTIO_INBOUND_TPROXY_MARK":           ignore("marks are Pillion's own (--slot)"),
			"ISTIO_INBOUND_TPROXY_ROUTE_TABLE":    ignore("tables are Pillion's own (--slot)"),
			"ISTIO_INBOUND_PORTS":                 hold(keyInboundInclude),
			"ISTIO_LOCAL_EXCLUDE_PORTS":           hold(keyInboundExclude),
			"ISTIO_OUTBOUND_PORTS":                hold(keyOutboundPorts),
			"ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE":  excludeOutboundPorts,
			"ISTIO_SERVICE_CIDR":                  hold(keyOutboundRanges),
			"ISTIO_SERVICE_EXCLUDE_CIDR":          excludeOutboundCIDRs,
			"ISTIO_EXCLUDE_INTERFACES":            excludeInterfaces,
			"KUBE_VIRT_INTERFACES":                virtual,
			"ISTIO_OUTBOUND_OWNER_GROUPS":         hold(keyGroupsInclude),
			"ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE": hold(keyGroupsExclude),
			"ISTIO_META_DNS_CAPTURE":              boolean(noDNS, asDefault),
			"REDIRECT_DNS":                        boolean(noDNS, asDefault),
			"CAPTURE_ALL_DNS":                     boolean(noDNS, asDefault),
			"INVALID_DROP":                        boolean(noConntrack, asDefault),
			"DROP_INVALID":                        boolean(noConntrack, asDefault),
			"ISTIO_DUAL_STACK":                    dualStack,
			"ISTIO_AGENT_DUAL_STACK":              dualStack,
			"ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR":   loopbackRange,
		},
		annotations: map[string]handler{
			istioOtherSettings + "interceptionMode":      interceptionMode,
			istioAnnotations + "includeInboundPorts":     hold(keyInboundInclude),
			istioAnnotations + "excludeInboundPorts":     hold(keyInboundExclude),
			istioAnnotations + "includeOutboundPorts":    hold(keyOutboundPorts),
			istioAnnotations + "excludeOutboundPorts":    excludeOutboundPorts,
			istioAnnotations + "includeOutboundIPRanges": hold(keyOutboundRanges),
			istioAnnotations + "excludeOutboundIPRanges": excludeOutboundCIDRs,
			istioAnnotations + "excludeInterfaces":       excludeInterfaces,
			istioAnnotations + "kubevirtInterfaces":      virtual,
			"istio.io/reroute-virtual-interfaces":        virtual,
			"status.sidecar.istio.io/port":               ignore(istioProxyOnly),
		},
		variablePrefixes:   []string{"ISTIO_"},
		annotationPrefixes: []string{istioAnnotations, istioOtherSettings, "status.sidecar.istio.io/"},
		harmless: []harmless{
			{regexp.MustCompile(`^ISTIO_META_|^ISTIO_(KUBE_APP_PROBERS|PROMETHEUS_ANNOTATIONS|BOOTSTRAP|CPU_LIMIT|VERSION|GATEWAY_STRIP_HOST_PORT|DELTA_XDS)$`), istioProxyOnly},
			{regexp.MustCompile(`^ISTIO_(IPTABLES_PROBE_PORT|PROBE_TIMEOUT|IPTABLES_TRACE_LOGGING)$`), istioRuleOnly},
			{regexp.MustCompile(`(?i)^sidecar[._]istio[._]io[/_](inject|status|proxy\w*|\w*loglevel|rewriteAppHTTPProbers|userVolume\w*|bootstrapOverride|discoveryAddress|enableCoreDump|extraStatTags|nativeSidecar|stats\w*|controlPlaneAuthPolicy)$`), istioProxyOnly},
		},
		finish: func(r *reader) {
			r.istioInbound(r.held[keyInboundInclude], r.held[keyInboundExclude])
			r.istioOutbound(r.held[keyOutboundRanges], r.held[keyOutboundPorts])
			r.istioGroups(r.held[keyGroupsInclude], r.held[keyGroupsExclude])
		},
	}
}

// emptyOnly refuses a list unless it is empty.
func emptyOnly(why, hint string) handler {
	return func(_ *reader, f *Finding) error {
		if strings.TrimSpace(f.Value) == "" {
			f.ignored("an empty list: nothing is meant")
		} else {
			f.refused(why, hint)
		}
		return nil
	}
}

func interceptionMode(r *reader, f *Finding) error {
	switch f.Value {
	case "":
		f.ignored("an empty value: nothing is meant")
		return nil
	case "REDIRECT":
		return backend("redirect")(r, f)
	case "TPROXY":
		return backend("tproxy")(r, f)
	case "NONE":
		return wantsNone(r, f)
	}
	return errors.New("must be REDIRECT, TPROXY or NONE")
}

var dualStack = boolean(asDefault, ignore("both families are captured always; --exclude-outbound-cidrs ::/0 and --exclude-inbound-cidrs ::/0 leave IPv6 alone"))

func loopbackRange(_ *reader, f *Finding) error {
	p, err := netip.ParsePrefix(strings.TrimSpace(f.Value))
	if err != nil {
		return errors.New("must be a prefix")
	}
	if !p.Addr().IsLoopback() || p.Bits() < 8 {
		f.refused("addresses outside of 127.0.0.0/8 are no loopback here", "exclude them: --exclude-outbound-cidrs "+p.Masked().String())
		return nil
	}
	f.ignored("loopback is never captured, all of 127.0.0.0/8")
	return nil
}

// istioInbound: an unset list leaves it at everything, an empty one is nothing, and exclusions are heeded only where
// everything is included (handleInboundPortsInclude in istio-iptables).
func (r *reader) istioInbound(include, exclude *Finding) {
	everyPort := include == nil || strings.TrimSpace(include.Value) == "*"
	switch {
	case include == nil:
	case everyPort:
		include.ignored("everything is captured anyway")
	case strings.TrimSpace(include.Value) == "":
		r.answer(include, noInbound)
	default:
		r.answer(include, includeInboundPorts)
	}
	if exclude == nil {
		return
	}
	if everyPort {
		r.answer(exclude, excludeInboundPorts)
	} else {
		exclude.ignored("Istio heeds it only where all inbound ports are included")
	}
}

// istioOutbound: ports are captured whatever their address, before the ranges are asked. Dimensions here are independent,
// so that both together can be said only where one of them is everything or nothing.
func (r *reader) istioOutbound(ranges, ports *Finding) {
	wanted := ""
	if ports != nil {
		wanted = strings.TrimSpace(ports.Value)
	}
	switch {
	case ranges == nil, strings.TrimSpace(ranges.Value) == "*", wanted == "*":
		for _, f := range []*Finding{ranges, ports} {
			if f != nil {
				f.ignored("everything is captured anyway")
			}
		}
	case strings.TrimSpace(ranges.Value) == "" && wanted == "":
		r.answer(ranges, noOutbound)
		if ports != nil {
			ports.ignored("an empty list: nothing is meant")
		}
	case strings.TrimSpace(ranges.Value) == "":
		r.answer(ports, includeOutboundPorts)
		ranges.ignored("only the outbound ports are captured")
	case wanted == "":
		r.answer(ranges, outboundRanges)
		if ports != nil {
			ports.ignored("an empty list: nothing is meant")
		}
	default:
		r.answer(ranges, outboundRanges)
		ports.refused("Istio captures these ports to any address beside the ranges; here a connection must be let in by its port and by its address",
			"widen the ranges, or drop the ports")
	}
}

// outboundRanges refuses what would capture loopback, which Istio does.
func outboundRanges(r *reader, f *Finding) error {
	list, err := parseList(f.Value, parseCIDRs)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Addr().IsLoopback() }) {
		f.refused("loopback is never captured", "take 127.0.0.0/8 and ::1 out of it")
		return nil
	}
	return includeOutboundCIDRs(r, f)
}

// istioGroups: exclusions are heeded only where all groups are included (ParseInterceptFilter in istio-iptables).
func (r *reader) istioGroups(include, exclude *Finding) {
	every := include == nil || strings.TrimSpace(include.Value) == "*"
	switch {
	case include == nil:
	case every:
		include.ignored("everything is captured anyway")
	case strings.TrimSpace(include.Value) == "":
		r.answer(include, func(r *reader, f *Finding) error {
			none := []config.IDRange{{First: 0, Last: 1<<32 - 2}}
			r.add(f, "exclude-gids", func(s *config.Selection) { s.GIDs.Exclude = append(s.GIDs.Exclude, none...) }, texts(none))
			return nil
		})
	default:
		r.answer(include, includeGIDs)
	}
	switch {
	case exclude == nil:
	case every:
		r.answer(exclude, excludeGIDs)
	default:
		exclude.ignored("Istio heeds it only where all groups are included")
	}
}

// answer runs a handler for a name that was held.
func (r *reader) answer(f *Finding, h handler) {
	if err := h(r, f); err != nil {
		r.malformed(f, err)
		r.all = slices.DeleteFunc(r.all, func(other *Finding) bool { return other == f })
	}
}
