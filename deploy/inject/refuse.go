// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"path"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// meshes are known by what their injectors leave in a pod: containers, and annotations that say "done".
var meshes = []struct {
	name        string
	containers  []string
	annotations []string
}{
	{"Istio", []string{"istio-proxy", "istio-init", "istio-validation"}, []string{"sidecar.istio.io/status"}},
	{"Linkerd", []string{"linkerd-proxy", "linkerd-init", "linkerd-network-validator"}, []string{"linkerd.io/proxy-version"}},
	{"Kuma", []string{"kuma-sidecar", "kuma-init", "kuma-validation"}, []string{"kuma.io/sidecar-injected"}},
	{"Consul", []string{"consul-dataplane", "consul-connect-inject-init", "envoy-sidecar"}, []string{"consul.hashicorp.com/connect-inject-status"}},
}

// refuse tells everything of a pod with which the capture cannot work.
func refuse(d *document, t template, s Settings) error {
	var f faults
	containers := own(t.spec, "containers")
	if len(items(containers.value)) == 0 {
		f.add(d, t.spec, "a pod has containers, written where the pod is: what an anchor or a merge (<<) brings cannot be added to", "a pod without containers")
		return f.err()
	}
	for _, name := range listNames {
		l := own(t.spec, name)
		if l.value == nil {
			continue
		}
		switch v := resolved(l.value); {
		case l.value.Kind == yaml.AliasNode:
			f.add(d, l.value, "write the list out", "%s is an alias, and cannot be added to", name)
		case v.Kind == yaml.ScalarNode && v.Tag == "!!null":
			f.add(d, l.key, "leave the key out", "%s is empty", name)
		case v.Kind != yaml.SequenceNode:
			f.add(d, l.value, "kubectl explain pod.spec."+name, "%s is no list", name)
		}
	}
	if n := get(t.spec, "hostNetwork").value; isTrue(n) {
		f.add(d, n, "capture single services on the node by their cgroup: deploy/systemd has an example; or annotate the pod with "+AnnotationPrefix+`inject: "false"`,
			"hostNetwork: the pod has the network namespace of its node, with everything else in it")
	}
	if n := windows(t.spec); n != nil {
		f.add(d, n, "annotate the pod with "+AnnotationPrefix+`inject: "false"`, "the pod runs on Windows; the capture is the Linux kernel's")
	}
	for _, m := range meshes {
		for _, a := range m.annotations {
			if key := get(find(t.metadata, "annotations"), a).key; key != nil {
				f.add(d, key, "two meshes in one pod would capture each other's traffic: take one out", "the pod is in %s already (annotation %s)", m.name, a)
			}
		}
	}
	if s.Variant == UnprivilegedProxy {
		if s.InitImage == "" && (strings.Contains(s.Image, "@") || !strings.Contains(path.Base(s.Image), ":")) {
			f.add(d, t.spec, "name the image with iptables: --init-image, or "+AnnotationPrefix+"init-image", "the image %s has no tag behind which -iptables could stand", s.Image)
		}
	}
	uid := s.told.Init.ProxyUID
	if n := runAs(t.spec, uid); n != nil {
		f.add(d, n, "let the app run as another user, or the sidecar, by "+AnnotationPrefix+"proxy-uid", "the pod runs as the user %d, which is the sidecar's: it could pass for it", uid)
	}
	for _, name := range []string{"initContainers", "containers"} {
		for _, c := range items(get(t.spec, name).value) {
			refuseContainer(&f, d, c, s, uid)
		}
	}
	for _, v := range items(get(t.spec, "volumes").value) {
		if text(get(v, "name").value) == cgroupName {
			f.add(d, v, "give it another name", "the volume %s is not one that `pillion inject` wrote", text(get(v, "name").value))
		}
	}
	return f.err()
}

func refuseContainer(f *faults, d *document, c *yaml.Node, s Settings, uid uint32) {
	name := get(c, "name").value
	if slices.Contains([]string{initName, sidecarName}, text(name)) {
		f.add(d, c, "give it another name; if it was written by hand, take it out", "the container %s is not one that `pillion inject` wrote", text(name))
	}
	for _, m := range meshes {
		if slices.Contains(m.containers, text(name)) {
			f.add(d, name, "two meshes in one pod would capture each other's traffic: take one out", "the pod is in %s already (container %s)", m.name, text(name))
		}
	}
	if n := runAs(c, uid); n != nil {
		f.add(d, n, "let it run as another user, or the sidecar, by "+AnnotationPrefix+"proxy-uid", "the container %s runs as the user %d, which is the sidecar's: it could pass for it", text(name), uid)
	}
	taken := s.ports()
	for _, p := range items(get(c, "ports").value) {
		n := get(p, "containerPort").value
		port := number(n)
		if flag := taken[uint16(port)]; port == int64(uint16(port)) && flag != "" && !strings.EqualFold(text(get(p, "protocol").value), "UDP") {
			f.add(d, n, "move the app's port, or the sidecar's by "+AnnotationPrefix+flag, "the container %s has the port %d, which is the sidecar's (--%s)", text(name), port, flag)
		}
	}
}

// runAs is where something says that it runs as a user.
func runAs(n *yaml.Node, uid uint32) *yaml.Node {
	user := get(find(n, "securityContext"), "runAsUser").value
	if number(user) == int64(uid) {
		return user
	}
	return nil
}

// number is the value of an integer, however it is written; -1 of anything else.
func number(n *yaml.Node) int64 {
	v := int64(-1)
	if n == nil || n.Decode(&v) != nil {
		return -1
	}
	return v
}

// isTrue is the value of a boolean, however it is written.
func isTrue(n *yaml.Node) bool {
	v := false
	return n != nil && n.Decode(&v) == nil && v
}

// osLabels are the labels of nodes that name their system; the second until Kubernetes 1.18.
var osLabels = []string{"kubernetes.io/os", "beta.kubernetes.io/os"}

// windows is where a pod says that it runs on Windows, and nowhere else.
func windows(spec *yaml.Node) *yaml.Node {
	says := []*yaml.Node{get(find(spec, "os"), "name").value}
	for _, label := range osLabels {
		says = append(says, get(find(spec, "nodeSelector"), label).value)
	}
	for _, n := range says {
		if text(n) == "windows" {
			return n
		}
	}
	terms := items(find(spec, "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution", "nodeSelectorTerms"))
	var first *yaml.Node
	for _, term := range terms { // a node fits that fits one of them
		n := demandsWindows(term)
		if n == nil {
			return nil
		}
		if first == nil {
			first = n
		}
	}
	return first
}

// demandsWindows is the expression of a term of node affinity that no node but one of Windows fits.
func demandsWindows(term *yaml.Node) *yaml.Node {
	for _, e := range items(find(term, "matchExpressions")) {
		values := items(find(e, "values"))
		others := slices.ContainsFunc(values, func(v *yaml.Node) bool { return text(v) != "windows" })
		if slices.Contains(osLabels, text(find(e, "key"))) && text(find(e, "operator")) == "In" && len(values) > 0 && !others {
			return e
		}
	}
	return nil
}

// ports are those of the sidecar, with the flag of each.
func (s Settings) ports() map[uint16]string {
	p := s.told.Proxy
	l := p.Listeners
	ports := map[uint16]string{l.Outbound: "outbound-port", l.Inbound: "inbound-port", l.InboundOwn: "inbound-own-port"}
	if p.Admin.IsValid() {
		ports[p.Admin.Port()] = "admin"
	}
	if p.Health.IsValid() {
		ports[p.Health.Port()] = "health"
	}
	return ports
}
