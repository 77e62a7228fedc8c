// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"fmt"
	"strconv"

	"go.yaml.in/yaml/v3"
)

// Nodes of our own.

func str(s string) *yaml.Node {
	n := &yaml.Node{}
	n.SetString(s)
	return n
}

func integer[T ~int | ~uint16 | ~uint32](i T) *yaml.Node {
	return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!int", Value: strconv.Itoa(int(i))}
}

func boolean(b bool) *yaml.Node {
	return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!bool", Value: strconv.FormatBool(b)}
}

func sequence(entries ...*yaml.Node) *yaml.Node {
	return &yaml.Node{Kind: yaml.SequenceNode, Content: entries}
}

// pair is a key and its value; a nil value leaves it out.
type pair struct {
	key   string
	value *yaml.Node
}

func mapping(pairs ...pair) *yaml.Node {
	n := &yaml.Node{Kind: yaml.MappingNode}
	for _, p := range pairs {
		if p.value != nil {
			n.Content = append(n.Content, str(p.key), p.value)
		}
	}
	return n
}

// because puts a comment behind a node.
func because(n *yaml.Node, why string) *yaml.Node {
	n.LineComment = why
	return n
}

// lists are what a pod gets.
func (s Settings) lists() []list {
	sidecar := s.sidecar()
	lists := []list{newList("initContainers", s.init(), sidecar)}
	if s.Sidecar == Ordinary {
		lists = []list{newList("initContainers", s.init()), newList("containers", sidecar)}
	}
	if s.Variant == Least {
		lists = append(lists, newList("volumes", mapping(
			pair{"name", str(cgroupName)},
			pair{"hostPath", mapping(pair{"path", str("/sys/fs/cgroup")}, pair{"type", str("Directory")})},
		)))
	}
	return lists
}

func newList(name string, entries ...*yaml.Node) list {
	l := list{name: name, entries: entries, data: make([]any, len(entries))}
	for i, e := range entries {
		if err := e.Decode(&l.data[i]); err != nil {
			panic(fmt.Sprintf("inject: a node of our own cannot be read: %v", err)) // a fault of this package
		}
	}
	return l
}

// NodeVariable is the variable of the environment by which `pillion init` knows the name of its node.
const NodeVariable = "PILLION_NODE"

// init is the container that installs the capture and exits.
func (s Settings) init() *yaml.Node {
	image := s.InitImage
	if image == "" {
		image = s.Image
		if s.Variant == UnprivilegedProxy {
			image += "-iptables"
		}
	}
	var security *yaml.Node
	var mounts *yaml.Node
	root := []pair{{"runAsUser", integer(0)}, {"runAsGroup", integer(0)}, {"runAsNonRoot", boolean(false)}, {"readOnlyRootFilesystem", boolean(true)}}
	confined := func(capabilities ...*yaml.Node) *yaml.Node {
		return mapping(append([]pair{
			{"allowPrivilegeEscalation", boolean(false)},
			{"capabilities", mapping(pair{"drop", sequence(str("ALL"))}, pair{"add", sequence(capabilities...)})},
			{"seccompProfile", s.InitSeccomp.node()},
		}, root...)...)
	}
	switch s.Variant {
	case Privileged:
		security = mapping(append([]pair{{"privileged", boolean(true)}}, root...)...)
	case Least:
		security = confined(
			because(str("BPF"), "to load the programs of the capture"),
			because(str("NET_ADMIN"), "to attach them, and to set rules and routes of the pod's network namespace"),
		)
		mounts = sequence(mapping(
			pair{"name", because(str(cgroupName), "the pod's cgroup is found in it; nothing is written")},
			pair{"mountPath", str("/host/sys/fs/cgroup")}, pair{"readOnly", boolean(true)},
		))
	case UnprivilegedProxy:
		security = confined(
			because(str("NET_ADMIN"), "to set packet filters in the pod's network namespace"),
			because(str("NET_RAW"), "which iptables-legacy wants"),
		)
	}
	var environment *yaml.Node
	if s.NodeName {
		environment = sequence(mapping(
			pair{"name", str(NodeVariable)},
			pair{"valueFrom", mapping(pair{"fieldRef", mapping(pair{"fieldPath", str("spec.nodeName")})})},
		))
	}
	return mapping(
		pair{"name", str(initName)},
		pair{"image", str(image)},
		pair{"args", args("init", s.initFlags())},
		pair{"env", environment},
		pair{"securityContext", security},
		pair{"resources", s.resources()},
		pair{"terminationMessagePolicy", str("FallbackToLogsOnError")},
		pair{"volumeMounts", mounts},
	)
}

// sidecar is the container that carries the traffic.
func (s Settings) sidecar() *yaml.Node {
	added := sequence(because(str("NET_RAW"), "to listen and to dial with the addresses of others"))
	if s.Variant == UnprivilegedProxy {
		added = nil
	}
	uid := s.told.Init.ProxyUID
	var restart, live, ready, startup *yaml.Node
	if health := s.told.Proxy.Health; health.IsValid() {
		port := health.Port()
		live, ready = probe(port, "live", 10, 3), probe(port, "ready", 5, 3)
		if s.Sidecar == Native {
			startup = probe(port, "ready", 1, 60)
		}
	}
	if s.Sidecar == Native {
		restart = str("Always")
	}
	return mapping(
		pair{"name", str(sidecarName)},
		pair{"image", str(s.Image)},
		pair{"args", args("proxy", s.proxyFlags())},
		pair{"restartPolicy", restart},
		pair{"securityContext", mapping(
			pair{"allowPrivilegeEscalation", boolean(false)},
			pair{"capabilities", mapping(pair{"drop", sequence(str("ALL"))}, pair{"add", added})},
			pair{"seccompProfile", mapping(pair{"type", str("RuntimeDefault")})},
			pair{"runAsUser", because(integer(uid), "by which the capture leaves its connections alone")},
			pair{"runAsGroup", integer(uid)},
			pair{"runAsNonRoot", boolean(true)},
			pair{"readOnlyRootFilesystem", boolean(true)},
		)},
		pair{"startupProbe", startup},
		pair{"livenessProbe", live},
		pair{"readinessProbe", ready},
		pair{"resources", s.resources()},
		pair{"terminationMessagePolicy", str("FallbackToLogsOnError")},
	)
}

// probe asks the sidecar's health port. Times are in seconds.
func probe(port uint16, what string, period, failures int) *yaml.Node {
	return mapping(
		pair{"httpGet", mapping(pair{"path", str("/healthz/" + what)}, pair{"port", integer(port)})},
		pair{"periodSeconds", integer(period)},
		pair{"failureThreshold", integer(failures)},
	)
}

// resources are what a container of ours asks for, and may have.
func (s Settings) resources() *yaml.Node {
	amounts := func(cpu, memory Quantity) *yaml.Node {
		var list []pair
		for _, p := range []struct {
			name string
			q    Quantity
		}{{"cpu", cpu}, {"memory", memory}} {
			if p.q != "" {
				list = append(list, pair{p.name, str(string(p.q))})
			}
		}
		if len(list) == 0 {
			return nil
		}
		return mapping(list...)
	}
	requests, limits := amounts(s.CPURequest, s.MemoryRequest), amounts(s.CPULimit, s.MemoryLimit)
	if requests == nil && limits == nil {
		return nil
	}
	return mapping(pair{"requests", requests}, pair{"limits", limits})
}
