// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"bytes"
	"errors"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// object is one of Kubernetes', or of somebody's who extends it.
type object struct {
	node        *yaml.Node
	kind, group string
	path        []any // keys and indices from the root of the document to it
	list        bool  // of other objects
}

// template is a pod or the template of pods.
type template struct {
	object   object
	path     []any      // from the root of the document to it
	node     *yaml.Node // has metadata and spec
	metadata *yaml.Node
	spec     *yaml.Node
}

// pod is what decides what a pod gets. Templates that share it by an alias are one.
type pod struct{ metadata, spec *yaml.Node }

func (t template) pod() pod { return pod{t.metadata, t.spec} }

// templatePaths lead from an object to its pod template.
var templatePaths = map[string][]string{
	"Pod": {}, "PodTemplate": {"template"},
	"Deployment": {"spec", "template"}, "StatefulSet": {"spec", "template"}, "DaemonSet": {"spec", "template"},
	"ReplicaSet": {"spec", "template"}, "ReplicationController": {"spec", "template"}, "Job": {"spec", "template"},
	"CronJob": {"spec", "jobTemplate", "spec", "template"},
}

// ownGroups are Kubernetes' own groups that have kinds with pods, all of which are known here.
var ownGroups = []string{"", "apps", "batch"}

// isKnown reports whether it is known where the object has its pods. A kind of the same name, of somebody else, is not.
func (o object) isKnown() bool {
	_, known := templatePaths[o.kind]
	return known && slices.Contains(ownGroups, o.group)
}

// objects are those of a document, with all that are in lists.
func (d *document) objects() ([]object, error) {
	if bytes.IndexByte(d.text, '*') >= 0 && d.root != nil && isList(d.root) {
		// A list may contain itself by an alias, or grow beyond all bounds: the decoder knows its limits.
		var v any
		if err := d.root.Decode(&v); err != nil {
			return nil, d.syntaxError(err)
		}
	}
	return d.objectsIn(d.root, nil)
}

func isList(n *yaml.Node) bool {
	kind := text(get(n, "kind").value)
	return kind == "List" || strings.HasSuffix(kind, "List") && get(n, "items").value != nil
}

func (d *document) objectsIn(n *yaml.Node, path []any) ([]object, error) {
	if n = resolved(n); n == nil || n.Kind == yaml.ScalarNode && (n.Value == "" || n.Tag == "!!null") {
		return nil, nil
	}
	o := object{node: n, kind: text(get(n, "kind").value), path: path, list: isList(n)}
	if o.kind == "" {
		return nil, d.at(n, "a Kubernetes object begins with apiVersion and kind", "no kind")
	}
	if group, _, has := strings.Cut(text(get(n, "apiVersion").value), "/"); has {
		o.group = group
	}
	all := []object{o}
	if !o.list {
		return all, nil
	}
	var errs []error
	for i, item := range items(get(n, "items").value) {
		more, err := d.objectsIn(item, append(slices.Clone(path), "items", i))
		all, errs = append(all, more...), append(errs, err)
	}
	return all, errors.Join(errs...)
}

// template is the pod template of an object; nil where it is not known to have one.
func (d *document) template(o object) (*template, error) {
	if !o.isKnown() {
		return nil, nil
	}
	t := template{object: o, path: slices.Clone(o.path), node: o.node}
	for _, key := range templatePaths[o.kind] {
		t.path = append(t.path, key)
		t.node = find(t.node, key)
	}
	t.metadata, t.spec = find(t.node, "metadata"), find(t.node, "spec")
	if t.node == nil || t.node.Kind != yaml.MappingNode || t.spec == nil {
		return nil, d.at(o.node, "kubectl explain "+o.kind+" shows what it must have", "a %s without the spec of a pod", o.kind)
	}
	return &t, nil
}

// misplaced refuses settings where nothing reads them: beside a pod's annotations rather than in them. What the pod's
// annotations say as well does no harm: some tools write an annotation wherever there can be one.
func misplaced(d *document, t *template) error {
	var f faults
	place := strings.Join(append(slices.Clone(templatePaths[t.object.kind]), "metadata.annotations"), ".")
	refuse := func(metadata *yaml.Node, list, what string) {
		for _, l := range fields(find(metadata, list)) {
			if strings.HasPrefix(l.key.Value, AnnotationPrefix) && text(find(t.metadata, "annotations", l.key.Value)) != text(l.value) {
				f.add(d, l.key, "move it to "+place+" of the "+t.object.kind, "%s %s: is not read here", what, l.key.Value)
			}
		}
	}
	n := t.object.node
	for _, key := range templatePaths[t.object.kind] {
		refuse(find(n, "metadata"), "annotations", "annotation")
		refuse(find(n, "metadata"), "labels", "label")
		n = find(n, key)
	}
	refuse(t.metadata, "labels", "label")
	return f.err()
}

// misplacedInList refuses settings of a list, whose pods have each their own.
func misplacedInList(d *document, o object) error {
	var f faults
	for _, list := range []string{"annotations", "labels"} {
		for _, l := range fields(find(o.node, "metadata", list)) {
			if strings.HasPrefix(l.key.Value, AnnotationPrefix) {
				f.add(d, l.key, "annotate each pod, or each template of pods, in the list", "%s of a %s: is not read here", l.key.Value, o.kind)
			}
		}
	}
	return f.err()
}
