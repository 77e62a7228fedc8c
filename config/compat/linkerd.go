// SPDX-License-Identifier: Apache-2.0

package compat

import "regexp"

// linkerd reads the annotations from which its injector makes the arguments of linkerd-init. That has no variables.
func linkerd() *system {
	const prefix = "config.linkerd.io/"
	proxyOnly := "about Linkerd's proxy, not about the capture"
	return &system{
		annotations: map[string]handler{
			prefix + "skip-inbound-ports":  excludeInboundPorts,
			prefix + "skip-outbound-ports": excludeOutboundPorts,
			prefix + "skip-subnets":        excludeInboundCIDRs, // linkerd-init compares the source, in PREROUTING alone
			prefix + "proxy-uid":           proxyUser,
			prefix + "proxy-gid":           excludeGIDs,
			prefix + "inbound-port":        listener("inbound-port", func(r *Result) *uint16 { return &r.Inbound }),
			prefix + "outbound-port":       listener("outbound-port", func(r *Result) *uint16 { return &r.Outbound }),
			prefix + "opaque-ports":        ignore("Pillion passes bytes as they come; no port needs to be opaque"),
			prefix + "control-port":        ignore(proxyOnly),
			prefix + "admin-port":          ignore(proxyOnly),
		},
		annotationPrefixes: []string{prefix},
		harmless: []harmless{
			{regexp.MustCompile(`(?i)^config[._]linkerd[._]io[/_](proxy[-_]|image[-_]|init[-_]image|debug[-_]image|enable[-_]|disable[-_]|default[-_]inbound[-_]policy|access[-_]log|trace[-_]collector|shutdown[-_]grace|pod[-_]inbound[-_]ports|close[-_]wait)`), proxyOnly},
		},
	}
}
