// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
)

// releases of Kubernetes whose OpenAPI documents the manifests must obey: the first that runs native sidecars without being
// asked to, and a new one.
var releases = []string{"v1.29.6", "v1.37.2"}

// schemas validate objects of one release, by kind.
type schemas map[string]*jsonschema.Schema

// kinds are where a pod may be, and the group and version of each, as the document names them.
var kinds = map[string]string{
	"Pod": "core.v1", "PodTemplate": "core.v1", "ReplicationController": "core.v1",
	"Deployment": "apps.v1", "StatefulSet": "apps.v1", "DaemonSet": "apps.v1", "ReplicaSet": "apps.v1",
	"Job": "batch.v1", "CronJob": "batch.v1",
}

// readSchemas derives JSON schemas from the OpenAPI document of a release, which is in its Go module.
func readSchemas(t *testing.T, release string) schemas {
	t.Helper()
	cmd := exec.Command("go", "mod", "download", "-json", "k8s.io/kubernetes@"+release)
	cmd.Dir = t.TempDir() // no module of ours is about it
	out, err := cmd.Output()
	var module struct{ Dir, Error string }
	if jsonErr := json.Unmarshal(out, &module); err != nil || jsonErr != nil {
		t.Fatalf("Kubernetes %s, for its OpenAPI document: %v %s (-short leaves this out)", release, err, module.Error)
	}
	text, err := os.ReadFile(filepath.Join(module.Dir, "api/openapi-spec/swagger.json"))
	if err != nil {
		t.Fatal(err)
	}
	var document struct {
		Definitions map[string]map[string]any `json:"definitions"`
	}
	if err := json.Unmarshal(text, &document); err != nil {
		t.Fatal(err)
	}
	definitions := make(map[string]any)
	for name, d := range document.Definitions {
		definitions[name] = strictly(d)
	}
	// A string or a number, in words that the document has no schema for.
	definitions["io.k8s.apimachinery.pkg.api.resource.Quantity"] = map[string]any{"type": []any{"string", "number"}}
	definitions["io.k8s.apimachinery.pkg.util.intstr.IntOrString"] = map[string]any{"type": []any{"string", "integer"}}

	compiler := jsonschema.NewCompiler()
	compiler.DefaultDraft(jsonschema.Draft4) // where Swagger 2.0 comes from
	if err := compiler.AddResource("k8s.json", map[string]any{"definitions": definitions}); err != nil {
		t.Fatal(err)
	}
	all := make(schemas)
	for kind, group := range kinds {
		s, err := compiler.Compile(fmt.Sprintf("k8s.json#/definitions/io.k8s.api.%s.%s", group, kind))
		if err != nil {
			t.Fatal(err)
		}
		all[kind] = s
	}
	return all
}

// strictly makes a schema refuse fields that it does not name. A null is a field that is not there, as the API server has it.
func strictly(schema any) any {
	m, ok := schema.(map[string]any)
	if !ok {
		return schema
	}
	strict := make(map[string]any)
	for k, v := range m {
		switch k {
		case "properties":
			properties := make(map[string]any)
			for name, p := range v.(map[string]any) {
				properties[name] = map[string]any{"anyOf": []any{map[string]any{"type": "null"}, strictly(p)}}
			}
			strict[k] = properties
			strict["additionalProperties"] = false
		case "items", "additionalProperties":
			strict[k] = strictly(v)
		case "format", "description", "default": // int32 and the like: no formats of JSON schemas
		default:
			strict[k] = v
		}
	}
	return strict
}

// validate reports what of an object the release does not have.
func (all schemas) validate(object map[string]any) error {
	kind, _ := object["kind"].(string)
	if items, ok := object["items"].([]any); ok {
		for _, item := range items {
			if err := all.validate(item.(map[string]any)); err != nil {
				return err
			}
		}
		return nil
	}
	if all[kind] == nil {
		return nil
	}
	text, err := json.Marshal(object)
	if err != nil {
		return err
	}
	plain, err := jsonschema.UnmarshalJSON(strings.NewReader(string(text)))
	if err != nil {
		return err
	}
	return all[kind].Validate(plain)
}

// TestInjectedIsValid: what comes out is what the OpenAPI documents of Kubernetes describe, without any field that they do
// not name.
func TestInjectedIsValid(t *testing.T) {
	if testing.Short() {
		t.Skip("fetches the OpenAPI documents of Kubernetes")
	}
	for _, release := range releases {
		all := readSchemas(t, release)
		for _, wrong := range []string{`"containers":[{"image":"x"}]`, `"containers":[{"name":"x"}],"initContainer":[]`, `"containers":[{"name":"x","ports":[{"containerPort":"http"}]}]`} {
			var object map[string]any
			if err := json.Unmarshal([]byte(`{"kind":"Pod","spec":{`+wrong+`}}`), &object); err != nil {
				t.Fatal(err)
			}
			if all.validate(object) == nil {
				t.Errorf("%s: %s is valid", release, wrong)
			}
		}
		eachInjected(t, func(name string, object map[string]any) {
			if err := all.validate(object); err != nil {
				t.Errorf("%s, Kubernetes %s: %v", name, release, err)
			}
		})
	}
}
