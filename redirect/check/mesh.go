// SPDX-License-Identifier: Apache-2.0

package check

import (
	"slices"
	"strings"
)

// meshes are the systems that redirect as we do, by the beginnings of their chains' or tables' names and by the ports of
// their proxies.
var meshes = []struct {
	name   string
	chains []string
	ports  []uint16
}{
	{"Istio", []string{"ISTIO_", "istio-"}, []uint16{15001, 15006, 15008, 15053}},
	{"Linkerd", []string{"PROXY_INIT_"}, []uint16{4140, 4143, 4190, 4191}},
	{"Kuma", []string{"KUMA_MESH_", "MESH_"}, nil}, // its ports are Istio's
	{"Consul", []string{"CONSUL_PROXY_", "CONSUL_DNS_"}, nil},
	{"Open Service Mesh", []string{"OSM_PROXY_"}, nil},
	{"AWS App Mesh", []string{"APPMESH_"}, nil},
}

// meshOf names the mesh that a chain belongs to, or "".
func meshOf(c Chain) string {
	for _, m := range meshes {
		for _, begin := range m.chains {
			if strings.HasPrefix(c.Name, begin) || strings.HasPrefix(c.Table, begin) {
				return m.name
			}
		}
	}
	return ""
}

// meshAt names the mesh whose proxy uses a port, or "".
func meshAt(port uint16) string {
	for _, m := range meshes {
		if slices.Contains(m.ports, port) {
			return m.name
		}
	}
	return ""
}
