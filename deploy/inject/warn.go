// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"fmt"
	"slices"
	"strings"

	"github.com/pillionproxy/pillion/config"
	"go.yaml.in/yaml/v3"
)

// Warning is something that was done, or was left as it is, and may not be what was meant.
type Warning struct {
	Text string // with file and line
	Hint string // what to do; may be empty
}

func (d *document) warning(n *yaml.Node, hint, format string, args ...any) Warning {
	return Warning{fmt.Sprintf("%s:%d:%d: %s", d.file, d.line+n.Line, n.Column, fmt.Sprintf(format, args...)), hint}
}

// warnOfObject tells of pods that get no sidecar because nobody knows the kind of what makes them, and of settings where
// people who know other meshes look for them.
func warnOfObject(d *document, o object) (list []Warning) {
	if o.kind == "Namespace" && o.group == "" {
		for _, what := range []string{"annotations", "labels"} {
			for _, l := range fields(find(o.node, "metadata", what)) {
				if strings.HasPrefix(l.key.Value, AnnotationPrefix) {
					list = append(list, d.warning(l.key, "annotate the pods in it", "%s of a Namespace: is not read here", l.key.Value))
				}
			}
		}
	}
	if !o.list && !o.isKnown() && !slices.Contains(ownGroups, o.group) && hasPodSpec(o.node, make(map[*yaml.Node]bool)) {
		list = append(list, d.warning(o.node, "its pods get no sidecar; where they need one, describe them by a kind that is known, as a Deployment or a Job",
			"kind %s of group %s: not known, left as it is", o.kind, o.group))
	}
	return list
}

// hasPodSpec finds something that looks like the spec of a pod.
func hasPodSpec(n *yaml.Node, seen map[*yaml.Node]bool) bool {
	if n = resolved(n); n == nil || n.Kind == yaml.ScalarNode || seen[n] {
		return false
	}
	seen[n] = true // an alias may lead back
	isContainer := func(c *yaml.Node) bool { return get(c, "image").value != nil }
	if slices.ContainsFunc(items(get(n, "containers").value), isContainer) {
		return true
	}
	return slices.ContainsFunc(n.Content, func(c *yaml.Node) bool { return hasPodSpec(c, seen) })
}

// warnOfOrder tells of init containers that run before an ordinary sidecar does: it starts when they have all ended, and
// until then there is no proxy.
func warnOfOrder(d *document, t template, s Settings) []Warning {
	if s.Sidecar != Ordinary || s.told.Init.OnProxyDown == config.Open {
		return nil
	}
	var names []string
	var first *yaml.Node
	for _, c := range items(get(t.spec, "initContainers").value) {
		if text(get(c, "restartPolicy").value) == "Always" && get(c, "startupProbe").value == nil {
			continue // nothing waits for it
		}
		names = append(names, text(get(c, "name").value))
		if first == nil {
			first = c
		}
	}
	if first == nil {
		return nil
	}
	ways := []string{"take --sidecar native (Kubernetes 1.29)", "exclude what they dial, as by --exclude-outbound-ports; each is an annotation too"}
	if s.Variant != UnprivilegedProxy { // packet filters cannot do it
		ways = slices.Insert(ways, 1, "--on-proxy-down open")
	}
	fate := "would wait for ever"
	if s.told.Init.OnProxyDown == config.Closed {
		fate = "would fail"
	}
	return []Warning{d.warning(first, strings.Join(ways, ", or "),
		"init containers %s: run before an ordinary sidecar does, and captured connections that they make %s (--on-proxy-down %s)",
		strings.Join(names, ", "), fate, s.told.Init.OnProxyDown)}
}
