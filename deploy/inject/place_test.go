// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"slices"
	"strings"
	"testing"

	"github.com/pillionproxy/pillion/config"
)

// TestSettingsWhereNothingReadsThem: beside the annotations of a pod rather than in them.
func TestSettingsWhereNothingReadsThem(t *testing.T) {
	const deployment = "kind: Deployment\nmetadata:\n  annotations: {pillion.dev/log-level: warn}\nspec:\n  template:\n    spec: {containers: [{name: a}]}\n"
	const cron = "kind: CronJob\nmetadata: {name: c}\nspec:\n  jobTemplate:\n    metadata: {annotations: {pillion.dev/inject: 'false'}}\n    spec:\n      template:\n        spec: {containers: [{name: a}]}\n"
	for name, tt := range map[string]struct{ text, says, way string }{
		"a Deployment itself":          {deployment, "f.yaml:3:17: annotation pillion.dev/log-level: is not read here", "spec.template.metadata.annotations of the Deployment"},
		"its label":                    {strings.Replace(deployment, "annotations", "labels", 1), "f.yaml:3:12: label pillion.dev/log-level: is not read here", "spec.template.metadata.annotations"},
		"the template's label":         {"kind: Job\nspec:\n  template:\n    metadata: {labels: {pillion.dev/inject: 'false'}}\n    spec: {containers: [{name: a}]}\n", "f.yaml:4:25: label pillion.dev/inject", "spec.template.metadata.annotations"},
		"a Pod's label":                {"kind: Pod\nmetadata: {labels: {pillion.dev/inject: 'true'}}\nspec: {containers: [{name: a}]}\n", "f.yaml:2:21: label pillion.dev/inject", "move it to metadata.annotations of the Pod"},
		"a CronJob itself":             {strings.Replace(cron, "{name: c}", "{annotations: {pillion.dev/variant: least}}", 1), "f.yaml:2:26: annotation pillion.dev/variant", "spec.jobTemplate.spec.template.metadata.annotations"},
		"a CronJob's Job":              {cron, "f.yaml:5:30: annotation pillion.dev/inject", "spec.jobTemplate.spec.template.metadata.annotations"},
		"a PodTemplate itself":         {"kind: PodTemplate\nmetadata: {annotations: {pillion.dev/inject: 'true'}}\ntemplate: {spec: {containers: [{name: a}]}}\n", "f.yaml:2:26:", "template.metadata.annotations"},
		"a List":                       {"kind: List\nmetadata: {annotations: {pillion.dev/inject: 'true'}}\nitems: [{kind: Pod, spec: {containers: [{name: a}]}}]\n", "f.yaml:2:26: pillion.dev/inject of a List", "annotate each pod"},
		"the template says other":      {strings.Replace(deployment, "template:\n", "template:\n    metadata: {annotations: {pillion.dev/log-level: info}}\n", 1), "f.yaml:3:17: annotation", ""},
		"the pod wants none of it":     {strings.Replace(deployment, "template:\n", "template:\n    metadata: {annotations: {pillion.dev/inject: 'false'}}\n", 1), "f.yaml:3:17: annotation", ""},
		"a template that is another's": {"kind: List\nitems:\n- kind: Job\n  spec: &s {template: {spec: {containers: [{name: a}]}}}\n- kind: Job\n  metadata: {annotations: {pillion.dev/inject: 'false'}}\n  spec: *s\n", "f.yaml:6:28: annotation", ""},
	} {
		t.Run(name, func(t *testing.T) {
			refused(t, tt.text, settings(), tt.says)
			if _, err := inject("f.yaml", []byte(tt.text), settings()); !strings.Contains(config.HintOf(err), tt.way) {
				t.Errorf("the hint %q does not say %q", config.HintOf(err), tt.way)
			}
			if out, err := Uninject("f.yaml", []byte(tt.text)); err != nil || string(out) != tt.text {
				t.Errorf("uninject: %v", err)
			}
		})
	}
	everywhere := strings.Replace(deployment, "template:\n", "template:\n    metadata: {labels: {a: b}, annotations: {pillion.dev/log-level: warn}}\n", 1)
	if _, err := inject("f.yaml", []byte(everywhere), settings()); err != nil {
		t.Errorf("in both places: %v", err)
	}
}

// TestPodsOfUnknownKinds: they pass as they are, but not without a word.
func TestPodsOfUnknownKinds(t *testing.T) {
	const pod = "spec: {template: {spec: {containers: [{name: a, image: b}]}}}\n"
	for text, says := range map[string]string{
		"apiVersion: argoproj.io/v1alpha1\nkind: Rollout\n" + pod:                                                                                         "f.yaml:1:1: kind Rollout of group argoproj.io: not known, left as it is",
		"kind: X\n---\napiVersion: serving.knative.dev/v1\nkind: Service\n" + pod:                                                                         "f.yaml:3:1: kind Service of group serving.knative.dev",
		"apiVersion: batch.volcano.sh/v1alpha1\nkind: Job\nspec: {tasks: [{template: {spec: {containers: [{image: b}]}}}]}\n":                             "kind Job of group batch.volcano.sh",
		"apiVersion: extensions/v1beta1\nkind: Deployment\n" + pod:                                                                                        "kind Deployment of group extensions",
		"kind: List\nitems:\n- {apiVersion: example.com/v1, kind: Widget, spec: {containers: [{image: b}]}}\n":                                            "f.yaml:3:3: kind Widget of group example.com",
		"apiVersion: example.com/v1\nkind: Widget\nx: &x {containers: [{image: b}], again: *x}\n":                                                         "kind Widget",
		"apiVersion: example.com/v1\nkind: Widget\nspec: {containers: [{name: b}]}\n":                                                                     "",
		"apiVersion: example.com/v1\nkind: Widget\nspec: {containers: {image: b}}\n":                                                                      "",
		"apiVersion: v1\nkind: ConfigMap\ndata: {containers: [{image: b}], pod.yaml: 'spec: {containers: [{image: b}]}'}\n":                               "",
		"apiVersion: apps/v1\nkind: ControllerRevision\ndata: {" + strings.TrimSpace(pod) + "}\n":                                                         "",
		"apiVersion: apiextensions.k8s.io/v1\nkind: CustomResourceDefinition\nspec: {properties: {containers: {items: {properties: {image: string}}}}}\n": "",
		"apiVersion: v1\nkind: Namespace\nmetadata: {labels: {pillion.dev/inject: enabled}}\n":                                                            "f.yaml:3:21: pillion.dev/inject of a Namespace: is not read here",
	} {
		out, warnings, err := Inject("f.yaml", []byte(text), settings())
		if err != nil || string(out) != text {
			t.Errorf("%q: %v, %q", text, err, out)
		}
		if (len(warnings) == 1) != (says != "") || len(warnings) > 1 {
			t.Errorf("%q: %d warnings: %v", text, len(warnings), warnings)
		} else if len(warnings) == 1 && (!strings.Contains(warnings[0].Text, says) || warnings[0].Hint == "") {
			t.Errorf("%q does not say %q, or what to do", warnings[0], says)
		}
	}
}

// TestInitContainersBeforeAnOrdinarySidecar: there is no proxy yet that would carry what they dial.
func TestInitContainersBeforeAnOrdinarySidecar(t *testing.T) {
	const pod = "kind: Pod\nmetadata: {annotations: {pillion.dev/sidecar: ordinary}}\nspec:\n  initContainers:\n  - {name: log, restartPolicy: Always}\n  - {name: migrate}\n  - {name: warm}\n  containers: [{name: a}]\n"
	with := func(more string) string { return strings.Replace(pod, "ordinary", "ordinary, "+more, 1) }
	for name, tt := range map[string]struct {
		text       string
		says, hint string // says is empty: no warning
	}{
		"hold":                   {pod, "f.yaml:6:5: init containers migrate, warm: run before an ordinary sidecar does, and captured connections that they make would wait for ever (--on-proxy-down hold)", "--on-proxy-down open"},
		"closed":                 {with("pillion.dev/on-proxy-down: closed"), "would fail (--on-proxy-down closed)", "--sidecar native"},
		"open":                   {with("pillion.dev/on-proxy-down: open"), "", ""},
		"native":                 {strings.Replace(pod, "ordinary", "native", 1), "", ""},
		"none of it":             {with("pillion.dev/inject: 'false'"), "", ""},
		"packet filters":         {with("pillion.dev/variant: unprivileged-proxy"), "would wait", "--exclude-outbound-ports"},
		"one that is waited for": {strings.Replace(pod, "Always", "Always, startupProbe: {}", 1), "init containers log, migrate, warm", ""},
		"no others":              {"kind: Pod\nmetadata: {annotations: {pillion.dev/sidecar: ordinary}}\nspec:\n  containers: [{name: a}]\n", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			out, warnings, err := Inject("f.yaml", []byte(tt.text), settings())
			if err != nil {
				t.Fatal(err)
			}
			if (len(warnings) == 1) != (tt.says != "") || len(warnings) > 1 {
				t.Fatalf("%d warnings: %v", len(warnings), warnings)
			}
			if len(warnings) == 1 && (!strings.Contains(warnings[0].Text, tt.says) || !strings.Contains(warnings[0].Hint, tt.hint)) {
				t.Errorf("%q does not say %q and %q", warnings[0], tt.says, tt.hint)
			}
			if name == "packet filters" && strings.Contains(warnings[0].Hint, "open") {
				t.Errorf("%q names what packet filters cannot do", warnings[0].Hint)
			}
			_, again, err := Inject("f.yaml", out, settings())
			if err != nil || !slices.Equal(again, warnings) {
				t.Errorf("again: %v %v", again, err)
			}
		})
	}
}
