// SPDX-License-Identifier: Apache-2.0

package compat

import "regexp"

// consul reads the annotations from which its injector makes the arguments of `consul connect redirect-traffic`. That
// has no variables. Of consul.hashicorp.com/ only what begins with transparent-proxy is about the capture.
func consul() *system {
	const (
		company = "consul.hashicorp.com/"
		prefix  = company + "transparent-proxy"
	)
	return &system{
		annotations: map[string]handler{
			prefix:                             boolean(asDefault, wantsNone),
			prefix + "-status":                 ignore("what Consul's injector has done"),
			prefix + "-exclude-inbound-ports":  excludeInboundPorts,
			prefix + "-exclude-outbound-ports": excludeOutboundPorts,
			prefix + "-exclude-outbound-cidrs": excludeOutboundCIDRs,
			prefix + "-exclude-uids":           excludeUIDs,
			prefix + "-overwrite-probes":       ignore("probes reach the app through the sidecar as they are"),
			company + "redirect-traffic-config": refuse("it is what Consul's injector wrote for its CNI plugin: this pod is Consul's already",
				"take Consul's injection off this pod; the other annotations say the same"),
			company + "consul-dns": boolean(noDNS, asDefault),
		},
		annotationPrefixes: []string{company},
		harmless: []harmless{
			{regexp.MustCompile(`(?i)^consul[._]hashicorp[._]com[/_](connect|gateway|kubernetes|mesh[-_]gateway|proxy[-_]config|service|use[-_]proxy|sidecar[-_]proxy|enable[-_]|consul[-_]|merged[-_]metrics|prometheus[-_]|envoy[-_]|original[-_]pod|peering[-_]|telemetry[-_])`), "about Consul's proxy and catalog, not about the capture"},
		},
	}
}
