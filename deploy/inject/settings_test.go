// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/pillionproxy/pillion/config"
)

// annotated is a pod with annotations, each in a line of its own, from line 5 on.
func annotated(annotations ...string) string {
	return "kind: Pod\nmetadata:\n  name: p\n  annotations:\n    " + strings.Join(annotations, "\n    ") + "\nspec:\n  containers: [{name: a}]\n"
}

// refused wants an error that says all of it, and nothing else done.
func refused(t *testing.T, text string, s Settings, says ...string) {
	t.Helper()
	out, warnings, err := Inject("f.yaml", []byte(text), s)
	if err == nil {
		t.Fatalf("no error for\n%s\n%s", text, out)
	}
	for _, want := range says {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not say %q", err, want)
		}
	}
	if out != nil || warnings != nil {
		t.Errorf("there is output all the same:\n%s\n%v", out, warnings)
	}
	if f := (*config.Fault)(nil); !errors.As(err, &f) || f.Exit != config.ExitConfig || config.HintOf(err) == "" {
		t.Errorf("%v is no fault of the configuration, or has no hint", err)
	}
}

// TestSettingsThatCannotBeTogether: what the containers would refuse when they start is refused where it is written.
func TestSettingsThatCannotBeTogether(t *testing.T) {
	for _, tt := range []struct {
		annotations []string
		says        string
	}{
		{[]string{"pillion.dev/log-level: info", `pillion.dev/outbound-port: "16006"`}, "f.yaml:6:32: annotation pillion.dev/outbound-port: --outbound-port 16006, --inbound-port 16006, --inbound-own-port 16007: must differ"},
		{[]string{`pillion.dev/outbound-port: "16020"`}, "f.yaml:5:32: annotation pillion.dev/outbound-port: --health [::]:16020: has the port of a listener"},
		{[]string{`pillion.dev/outbound-port: "0"`}, "f.yaml:5:32: annotation pillion.dev/outbound-port: --outbound-port: must be from 1"},
		{[]string{`pillion.dev/outbound-port: "20000"`}, "contains the listener port 20000"},
		{[]string{`pillion.dev/proxy-uid: "0"`}, "f.yaml:5:28: annotation pillion.dev/proxy-uid: --proxy-uid 0: root"},
		{[]string{`pillion.dev/health: "127.0.0.1:9020"`}, "f.yaml:5:25: annotation pillion.dev/health: --health 127.0.0.1:9020: the kubelet does not reach"},
		{[]string{`pillion.dev/health: "[::ffff:127.0.0.1]:9020"`}, "the kubelet does not reach"},
		{[]string{`pillion.dev/health: "[::]:0"`}, "--health [::]:0: any free port"},
		{[]string{`pillion.dev/health: "[::]:16000"`}, "--admin 127.0.0.1:16000 and --health [::]:16000: must differ"},
		{[]string{`pillion.dev/memory-limit: 32Mi`}, "f.yaml:5:31: annotation pillion.dev/memory-limit: --memory-limit 32Mi: is less than --memory-request 40Mi"},
		{[]string{`pillion.dev/cpu-limit: 100m`, `pillion.dev/cpu-request: "0.2"`}, "--cpu-limit 100m: is less than --cpu-request 0.2"},
		{[]string{`pillion.dev/variant: unprivileged-proxy`, `pillion.dev/backend: ebpf`}, "f.yaml:6:26: annotation pillion.dev/backend: --backend ebpf: the variant unprivileged-proxy has"},
		{[]string{`pillion.dev/variant: unprivileged-proxy`, `pillion.dev/listen: loopback`}, "takes CAP_NET_RAW"},
		{[]string{`pillion.dev/backend: redirect`}, "listens on loopback"},
	} {
		s := settings(func(s *Settings) {
			any := func(string) error { return nil }
			s.Known["backend"], s.Known["listen"] = Setting{Init: true, Check: any}, Setting{Proxy: true, Check: any}
		})
		text := annotated(tt.annotations...)
		refused(t, text, s, tt.says)
		_, _, err := Inject("f.yaml", []byte(text), s)
		if lines := strings.Split(err.Error(), "\n"); len(lines) != 1 {
			t.Errorf("one problem is told %d times:\n%v", len(lines), err)
		}
		opted := strings.Replace(text, "  annotations:\n", "  annotations:\n    pillion.dev/inject: \"false\"\n", 1)
		if out, err := inject("f.yaml", []byte(opted), s); err != nil || string(out) != opted {
			t.Errorf("refused though it wants none of it: %v", err)
		}
	}
}

// TestSettingsThatCanBeTogether: nothing is refused that runs.
func TestSettingsThatCanBeTogether(t *testing.T) {
	for _, annotations := range [][]string{
		{`pillion.dev/health: none`},
		{`pillion.dev/health: "10.0.0.1:9000"`},
		{`pillion.dev/memory-limit: 40Mi`},
		{`pillion.dev/memory-limit: "41943040"`},
		{`pillion.dev/cpu-limit: "0.01"`},
		{`pillion.dev/memory-request: ""`, `pillion.dev/memory-limit: 1Ki`},
	} {
		if _, err := inject("f.yaml", []byte(annotated(annotations...)), settings()); err != nil {
			t.Errorf("%v: %v", annotations, err)
		}
	}
}

// TestValidate: without a pod, the same problems are told by their flags.
func TestValidate(t *testing.T) {
	if err := settings().Validate(); err != nil {
		t.Error(err)
	}
	if err := Default().Validate(); err != nil {
		t.Error(err)
	}
	s := settings(func(s *Settings) {
		s.Values["outbound-port"], s.MemoryLimit = "16006", "1Mi"
		s.Configure = func(init, proxy map[string]string) (Told, error) {
			told, _ := configure(init, proxy)
			return told, errors.New("no host can do this")
		}
	})
	err := s.Validate()
	if err == nil {
		t.Fatal("no error")
	}
	lines := strings.Split(err.Error(), "\n")
	for i, want := range []string{"no host can do this", "--outbound-port 16006", "--memory-limit 1Mi"} {
		if len(lines) != 3 || !strings.HasPrefix(lines[i], want) {
			t.Errorf("problem %d is not %q in\n%v", i, want, err)
		}
	}
	refused(t, annotated("a: b"), s, "f.yaml:7:3: --outbound-port 16006")
}

// TestAppOnAPortOfTheSidecar: the sidecar's ports are those that it is told, wherever they were moved.
func TestAppOnAPortOfTheSidecar(t *testing.T) {
	text := strings.Replace(annotated(`pillion.dev/health: "[::]:9000"`), "{name: a}", "{name: a, ports: [{containerPort: 9000}]}", 1)
	refused(t, text, settings(), "the container a has the port 9000", "(--health)")
}

func TestQuantities(t *testing.T) {
	for _, tt := range []struct {
		less, more Quantity
	}{
		{"0", "1n"},
		{"1n", "1u"},
		{"999u", "1m"},
		{"100m", "0.2"},
		{"1023", "1Ki"},
		{"1k", "1Ki"},
		{"1.5Gi", "2G"},
		{"1e3", "1Ki"},
		{"2.", "3"},
		{"1E", "1Ei"},
		{"1E2", "1E"},
		{"1Pi", "1E"},
	} {
		if lessThan("x", tt.less, tt.more) == nil || lessThan("x", tt.more, tt.less) != nil || lessThan("x", tt.more, tt.more) != nil {
			t.Errorf("%s is not less than %s", tt.less, tt.more)
		}
	}
	for _, same := range [][2]Quantity{{"0.1", "100m"}, {"1Ki", "1024"}, {"1e3", "1k"}} {
		if lessThan("x", same[0], same[1]) != nil || lessThan("x", same[1], same[0]) != nil {
			t.Errorf("%s is not %s", same[0], same[1])
		}
	}
	for _, wrong := range []string{"1e999", "-1", "x", "1 Mi", "1kB", "."} {
		if new(Quantity).Set(wrong) == nil {
			t.Errorf("%q is taken for a quantity", wrong)
		}
	}
}

// TestWindows: a pod that no node but one of Windows would run, however it says so.
func TestWindows(t *testing.T) {
	affinity := func(terms string) string {
		return "affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [" + terms + "]}}}"
	}
	const is = "{matchExpressions: [{key: zone, operator: Exists}, {key: kubernetes.io/os, operator: In, values: [windows]}]}"
	const isOld = "{matchExpressions: [{key: beta.kubernetes.io/os, operator: In, values: [windows]}]}"
	const may = "{matchExpressions: [{key: kubernetes.io/os, operator: In, values: [windows, linux]}]}"
	const isNot = "{matchExpressions: [{key: kubernetes.io/os, operator: NotIn, values: [windows]}]}"
	const other = "{matchExpressions: [{key: zone, operator: In, values: [windows]}]}"
	for spec, wanted := range map[string]bool{
		"os: {name: windows}": true, "nodeSelector: {kubernetes.io/os: windows}": true, "nodeSelector: {beta.kubernetes.io/os: windows}": true,
		affinity(is): true, affinity(is + ", " + isOld): true,
		"os: {name: linux}": false, affinity(""): false, affinity(may): false, affinity(isNot): false, affinity(other): false, affinity(is + ", " + may): false, affinity("{}, " + is): false,
		strings.Replace(affinity(is), "required", "preferred", 1): false,
	} {
		text := fmt.Sprintf("kind: Pod\nspec:\n  %s\n  containers: [{name: a}]\n", spec)
		if wanted {
			refused(t, text, settings(), "f.yaml:3:", "the pod runs on Windows")
		} else if _, err := inject("f.yaml", []byte(text), settings()); err != nil {
			t.Errorf("%s: %v", spec, err)
		}
	}
}
