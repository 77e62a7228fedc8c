// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/pillionproxy/pillion/config"
	"github.com/rogpeppe/go-internal/txtar"
	"go.yaml.in/yaml/v3"
	"gotest.tools/v3/golden"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	sigsyaml "sigs.k8s.io/yaml"
)

// settings as the command gives them, of a few flags.
func settings(change ...func(*Settings)) Settings {
	s := Default()
	s.Image = "registry.example/pillion:1"
	any := func(string) error { return nil }
	s.Known = map[string]Setting{
		"exclude-outbound-ports": {Init: true, Check: func(v string) error { _, err := config.ParsePorts(v); return err }},
		"on-proxy-down":          {Init: true, Check: func(v string) error { return new(config.FailureMode).Set(v) }},
		"outbound-port":          {Init: true, Proxy: true, Check: any},
		"proxy-uid":              {Init: true, Check: any},
		"log-level":              {Proxy: true, Check: any},
		"health":                 {Proxy: true, Check: any},
	}
	s.Configure = configure
	for _, c := range change {
		c(&s)
	}
	return s
}

// configure reads some of the flags that the containers are told.
func configure(init, proxy map[string]string) (told Told, err error) {
	told = Told{config.DefaultCapture(), config.DefaultProxy()}
	scan := func(from map[string]string, name string, to any) {
		if v, is := from[name]; is && err == nil {
			_, err = fmt.Sscan(v, to)
		}
	}
	scan(init, "proxy-uid", &told.Init.ProxyUID)
	scan(init, "outbound-port", &told.Init.Listeners.Outbound)
	scan(proxy, "outbound-port", &told.Proxy.Listeners.Outbound)
	if v, is := init["on-proxy-down"]; is {
		err = errors.Join(err, told.Init.OnProxyDown.Set(v))
	}
	switch v := proxy["health"]; v {
	case "":
	case "none":
		told.Proxy.Health = netip.AddrPort{}
	default:
		var herr error
		told.Proxy.Health, herr = netip.ParseAddrPort(v)
		err = errors.Join(err, herr)
	}
	return told, err
}

// inject is Inject without its warnings.
func inject(file string, stream []byte, s Settings) ([]byte, error) {
	out, _, err := Inject(file, stream, s)
	return out, err
}

// corpus is every manifest in every variation.
func corpus(t testing.TB) map[string][]byte {
	t.Helper()
	archive, err := txtar.ParseFile("testdata/corpus.txtar")
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string][]byte)
	for _, f := range archive.Files {
		all[f.Name] = f.Data
		all[f.Name+", CRLF"] = bytes.ReplaceAll(f.Data, []byte("\n"), []byte("\r\n"))
		all[f.Name+", without its last newline"] = bytes.TrimRight(f.Data, "\n")
		all[f.Name+", with a byte order mark"] = append([]byte("\ufeff"), f.Data...)
		if !bytes.HasPrefix(f.Data, []byte("%")) {
			all[f.Name+", behind a separator"] = append([]byte("---\n"), f.Data...)
			all[f.Name+", before another"] = append(append(bytes.Clone(f.Data), "\n---\n"...), archive.Files[0].Data...)
		}
	}
	return all
}

// manners are the settings to try.
func manners() map[string]Settings {
	all := make(map[string]Settings)
	for _, v := range variants {
		for _, f := range forms {
			all[string(v)+", "+string(f)] = settings(func(s *Settings) { s.Variant, s.Sidecar = v, f })
		}
	}
	return all
}

// mannersOf are the settings to try with a manifest: of a variation those two that differ most.
func mannersOf(name string) map[string]Settings {
	all := manners()
	if strings.Contains(name, ", ") {
		maps.DeleteFunc(all, func(manner string, _ Settings) bool {
			return manner != "least, ordinary" && manner != "privileged, native"
		})
	}
	return all
}

// TestUninjectGivesBack: what was injected is taken out, byte for byte; and injecting twice is injecting once, also with
// other settings in between.
func TestUninjectGivesBack(t *testing.T) {
	for name, original := range corpus(t) {
		for manner, s := range mannersOf(name) {
			injected, err := inject(name, original, s)
			if err != nil {
				t.Errorf("%s, %s: %v", name, manner, err)
				continue
			}
			if untouched := bytes.Equal(injected, original); untouched != isUntouched(name) {
				t.Errorf("%s, %s: untouched is %t", name, manner, untouched)
			}
			back, err := Uninject(name, injected)
			if err != nil || !bytes.Equal(back, original) {
				t.Errorf("%s, %s: %v\ninjected:\n%q\ntaken out:\n%q", name, manner, err, injected, back)
			}
			for _, o := range []Settings{s, settings(func(s *Settings) { s.Variant, s.Sidecar = Least, Ordinary })} {
				between, err := inject(name, injected, o)
				if err != nil {
					t.Errorf("%s, %s, then %s: %v", name, manner, o.Variant, err)
				}
				if again, err := inject(name, between, s); err != nil || !bytes.Equal(again, injected) {
					t.Errorf("%s, %s, then %s: %v\n%s\nis not\n%s", name, manner, o.Variant, err, again, injected)
				}
			}
			if same, err := Uninject(name, original); err != nil || !bytes.Equal(same, original) {
				t.Errorf("%s: taken out of what has none: %v", name, err)
			}
		}
	}
}

func isUntouched(name string) bool {
	file, variation, _ := strings.Cut(name, ", ")
	switch file {
	case "not-wanted.yaml", "crd.yaml", "only-comments.yaml", "nothing.yaml":
		return variation != "before another"
	}
	return false
}

// TestInjectedIsKubernetes: what comes out parses strictly into the types of the API.
func TestInjectedIsKubernetes(t *testing.T) {
	eachInjected(t, func(name string, object map[string]any) { strict(t, name, object) })
}

// eachInjected gives every object of the corpus, injected in every manner.
func eachInjected(t *testing.T, try func(name string, object map[string]any)) {
	t.Helper()
	for name, original := range corpus(t) {
		if strings.HasPrefix(name, "unicode.yaml") { // has a field that is none, to have it between ours
			continue
		}
		for manner, s := range mannersOf(name) {
			injected, err := inject(name, original, s)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			for _, d := range documents(name, injected) {
				if err := d.parse(); err != nil {
					t.Fatalf("%s, %s: %v\n%s", name, manner, err, injected)
				}
				var object map[string]any
				if err := yaml.Unmarshal(d.text, &object); err != nil || object == nil {
					continue
				}
				try(name+", "+manner, object)
			}
		}
	}
}

func strict(t *testing.T, name string, object map[string]any) {
	t.Helper()
	kind, _ := object["kind"].(string)
	if list, ok := object["items"].([]any); ok {
		for _, item := range list {
			strict(t, name, item.(map[string]any))
		}
		return
	}
	into := map[string]any{
		"Pod": &corev1.Pod{}, "PodTemplate": &corev1.PodTemplate{}, "ReplicationController": &corev1.ReplicationController{},
		"Deployment": &appsv1.Deployment{}, "StatefulSet": &appsv1.StatefulSet{}, "DaemonSet": &appsv1.DaemonSet{}, "ReplicaSet": &appsv1.ReplicaSet{},
		"Job": &batchv1.Job{}, "CronJob": &batchv1.CronJob{},
	}[kind]
	if into == nil {
		return
	}
	text, err := yaml.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	if err := sigsyaml.UnmarshalStrict(text, into); err != nil {
		t.Errorf("%s: %v\n%s", name, err, text)
	}
}

// TestVariants compares each variant with testdata/*.yaml.
func TestVariants(t *testing.T) {
	archive, err := txtar.ParseFile("testdata/corpus.txtar")
	if err != nil {
		t.Fatal(err)
	}
	for manner, s := range manners() {
		for _, f := range archive.Files {
			if f.Name != "comments.yaml" && f.Name != "pod.json" {
				continue
			}
			injected, err := inject(f.Name, f.Data, s)
			if err != nil {
				t.Fatal(err)
			}
			golden.Assert(t, string(injected), strings.ReplaceAll(manner, ", ", "-")+"-"+f.Name)
		}
	}
}

// TestExamples: deploy/pod shows each variant.
func TestExamples(t *testing.T) {
	shop, err := os.ReadFile("../pod/shop.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range variants {
		injected, err := inject("shop.yaml", shop, settings(func(s *Settings) { s.Variant = v }))
		if err != nil {
			t.Fatal(err)
		}
		golden.Assert(t, string(injected), "../../pod/shop-"+string(v)+".yaml")
	}
}

// TestErrors: each tells the place, and what to do.
func TestErrors(t *testing.T) {
	const pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec:\n"
	for _, tt := range []struct {
		name, text string
		says       []string
	}{
		{"broken", "a: [1\n", []string{"f.yaml:", "did not find expected"}},
		{"broken, second document", "a: 1\nkind: X\n---\nb: [\n", []string{"f.yaml:"}},
		{"no kind", "apiVersion: v1\nspec: {}\n", []string{"f.yaml:1:1: no kind"}},
		{"no spec", "kind: Deployment\nspec: {}\n", []string{"f.yaml:1:1: a Deployment without the spec of a pod"}},
		{"no containers", pod + "  restartPolicy: Never\n", []string{"f.yaml:5:3: a pod without containers"}},
		{"containers by a merge", pod + "  <<: {containers: [{name: a}]}\n", []string{"a pod without containers"}},
		{"an alias", "x: &c [{name: a}]\n" + pod + "  containers: *c\n", []string{"f.yaml:6:15: containers is an alias"}},
		{"null", pod + "  initContainers:\n  containers: [{name: a}]\n", []string{"f.yaml:5:3: initContainers is empty"}},
		{"host network", pod + "  hostNetwork: true\n  containers: [{name: a}]\n", []string{"f.yaml:5:16: hostNetwork"}},
		{"Windows", pod + "  nodeSelector: {kubernetes.io/os: windows}\n  containers: [{name: a}]\n", []string{"f.yaml:5:36: the pod runs on Windows"}},
		{"Istio", pod + "  containers: [{name: a}, {name: istio-proxy}]\n", []string{"f.yaml:5:34: the pod is in Istio already"}},
		{"Linkerd", "kind: Pod\nmetadata: {annotations: {linkerd.io/proxy-version: x}}\nspec: {containers: [{name: a}]}\n", []string{"f.yaml:2:26: the pod is in Linkerd already"}},
		{"our user", pod + "  securityContext: {runAsUser: 1666}\n  containers: [{name: a}]\n", []string{"f.yaml:5:32: the pod runs as the user 1666"}},
		{"our user, container", pod + "  containers: [{name: a, securityContext: {runAsUser: 1666}}]\n", []string{"f.yaml:5:55: the container a runs as the user 1666"}},
		{"our port", pod + "  containers: [{name: a, ports: [{containerPort: 16001}]}]\n", []string{"f.yaml:5:50: the container a has the port 16001", "--outbound-port"}},
		{"our name", pod + "  containers: [{name: pillion}]\n", []string{"f.yaml:5:16: the container pillion is not one that"}},
		{"unknown annotation", "kind: Pod\nmetadata: {annotations: {pillion.dev/ports: x}}\nspec: {containers: [{name: a}]}\n", []string{"f.yaml:2:26: annotation pillion.dev/ports: unknown"}},
		{"wrong annotation", "kind: Pod\nmetadata: {annotations: {pillion.dev/variant: x}}\nspec: {containers: [{name: a}]}\n", []string{"f.yaml:2:47:", `"x" is none of privileged, least, unprivileged-proxy`}},
		{"wrong ports", "kind: Pod\nmetadata: {annotations: {pillion.dev/exclude-outbound-ports: http}}\nspec: {containers: [{name: a}]}\n", []string{"f.yaml:2:62:", "http"}},
		{"a number", "kind: Pod\nmetadata: {annotations: {pillion.dev/exclude-outbound-ports: 80}}\nspec: {containers: [{name: a}]}\n", []string{"f.yaml:2:62:", "must be a string"}},
		{"inject: maybe", "kind: Pod\nmetadata: {annotations: {pillion.dev/inject: maybe}}\nspec: {containers: [{name: a}]}\n", []string{"f.yaml:2:46:", "maybe"}},
		{"two at once", pod + "  hostNetwork: true\n  containers: [{name: istio-proxy}]\n", []string{"hostNetwork", "Istio"}},
		{"in the second document", "kind: X\n---\n" + pod + "  hostNetwork: true\n  containers: [{name: a}]\n", []string{"f.yaml:7:16: hostNetwork"}},
		{"an anchor at a list", pod + "  containers:\n  - name: a\n  initContainers: &c\n  - name: i\n", []string{"f.yaml:1: the sidecar cannot be written"}},
		{"a tag at a list", pod + "  containers: !!seq [{name: a}]\n  initContainers: !!seq [{name: i}]\n", []string{"f.yaml:1: the sidecar cannot be written"}},
		{"explicit keys", pod + "  ? containers\n  : - name: a\n", []string{"f.yaml:1: the sidecar cannot be written"}},
		{"what a merge brings", "kind: List\nitems:\n- kind: X\n  spec: &base {initContainers: [{name: migrate}]}\n- kind: Pod\n  spec:\n    <<: *base\n    containers: [{name: a}]\n", []string{"f.yaml:1: the sidecar cannot be written", "something else would change"}},
		{"a key twice", pod + "  containers: [{name: a}]\n  containers: [{name: b}]\n", []string{"f.yaml:1: ", "already defined"}},
		{"a carriage return", "kind: X\n---\n" + pod + "  # a\rb\n  containers: [{name: a}]\n", []string{"f.yaml:7: a carriage return"}},
		{"a line separator", pod + "  # a\u2028b\n  containers: [{name: a}]\n", []string{"f.yaml:5: the character U+2028"}},
		{"UTF-16", "\xff\xfek\x00", []string{"f.yaml:1: UTF-16"}},
		{"no UTF-8", pod + "  hostname: \xff\n", []string{"f.yaml:5: byte 0xff"}},
		{"JSON behind JSON", `{"kind":"Pod","spec":{"containers":[{"name":"a"}]}}` + "\n" + `{"kind":"Pod","spec":{"containers":[{"name":"b"}]}}`, []string{"f.yaml:"}},
		{"our name by chance", `{"kind":"Pod","spec":{"containers":[{"name":"pillion","image":"mine"},{"name":"a"}]}}`, []string{"f.yaml:1:37: the container pillion is not one that"}},
		{"garbage behind a percent sign", "%\x01\x02\nx: [", []string{"f.yaml:1: "}},
		{"host network, as YAML 1.1 writes it", pod + "  hostNetwork: yes\n  containers: [{name: a}]\n", []string{"f.yaml:5:16: hostNetwork"}},
		{"our port, in hexadecimal", pod + "  containers: [{name: a, ports: [{containerPort: 0x3e81}]}]\n", []string{"the container a has the port 16001"}},
		{"a newline in a setting", "kind: Pod\nmetadata: {annotations: {pillion.dev/log-level: \"info\\n# pillion: end\"}}\nspec: {containers: [{name: a}]}\n", []string{"f.yaml:2:49:", "control characters"}},
		{"a list within itself", "&a {kind: List, items: [*a, {spec: {}}]}\n", []string{"f.yaml:1: anchor 'a' value contains itself"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, err := inject("f.yaml", []byte(tt.text), settings())
			if err == nil {
				t.Fatalf("no error:\n%s", out)
			}
			for _, s := range tt.says {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("%q does not say %q", err, s)
				}
			}
			if out != nil {
				t.Errorf("there is output all the same:\n%s", out)
			}
			if f := (*config.Fault)(nil); !errors.As(err, &f) || f.Exit != config.ExitConfig {
				t.Errorf("%v is no fault of the configuration", err)
			}
		})
	}
}

// TestImpossibleSettings: settings that cannot work together in any pod are told with the pod.
func TestImpossibleSettings(t *testing.T) {
	const pod = "kind: Pod\nspec:\n  containers: [{name: a}]\n"
	for says, s := range map[string]Settings{
		"no tag behind which -iptables": settings(func(s *Settings) { s.Variant, s.Image = UnprivilegedProxy, "r/p@sha256:00" }),
		"r/p has no tag":                settings(func(s *Settings) { s.Variant, s.Image = UnprivilegedProxy, "r/p" }),
		"has the backend redirect": settings(func(s *Settings) {
			s.Known["backend"] = Setting{Init: true}
			s.Variant, s.Values = UnprivilegedProxy, map[string]string{"backend": "ebpf"}
		}),
		"--proxy-uid 0": settings(func(s *Settings) { s.Values = map[string]string{"proxy-uid": "0"} }),
	} {
		if out, err := inject("f.yaml", []byte(pod), s); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v; want %q\n%s", err, says, out)
		}
	}
}

// TestNotOurs: what is no pod of Kubernetes' own passes as it is.
func TestNotOurs(t *testing.T) {
	for _, text := range []string{
		"apiVersion: batch.volcano.sh/v1alpha1\nkind: Job\nspec: {tasks: []}\n",
		"null\n---\n~\n",
		"%YAML 1.2\n# a comment\n---\nkind: X\n",
	} {
		if out, err := inject("f.yaml", []byte(text), settings()); err != nil || string(out) != text {
			t.Errorf("%q: %v, %q", text, err, out)
		}
	}
}

// TestChanged: what was changed after it was injected is refused, by both, rather than guessed at.
func TestChanged(t *testing.T) {
	const pod = "kind: Pod\nspec:\n  initContainers:\n  - name: i\n  containers:\n  - name: a\n  volumes:\n  - name: v\n"
	s := settings(func(s *Settings) { s.Variant, s.Sidecar = Least, Ordinary })
	injected, err := inject("f.yaml", []byte(pod), s)
	if err != nil {
		t.Fatal(err)
	}
	var object any
	if err := yaml.Unmarshal(injected, &object); err != nil {
		t.Fatal(err)
	}
	anew, err := yaml.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"the end of a block is lost":   strings.Replace(string(injected), "  "+end+"\n", "", 1),
		"an entry in our block":        strings.Replace(string(injected), "  "+end+"\n", "  - name: mine\n  "+end+"\n", 1),
		"written by another program":   string(anew),
		"the comments were taken away": strings.NewReplacer(begin, "#", end, "#").Replace(string(injected)),
	} {
		for verb, do := range map[string]func() ([]byte, error){
			"inject":   func() ([]byte, error) { return inject("f.yaml", []byte(text), s) },
			"uninject": func() ([]byte, error) { return Uninject("f.yaml", []byte(text)) },
		} {
			out, err := do()
			if f := (*config.Fault)(nil); !errors.As(err, &f) || f.Exit != config.ExitConfig || f.Hint == "" {
				t.Errorf("%s, %s: %v\n%s", name, verb, err, out)
			}
		}
	}
}

// TestMoved: who moves the app away, or the sidecar, is not refused.
func TestMoved(t *testing.T) {
	const text = "kind: Pod\nmetadata: {annotations: {pillion.dev/proxy-uid: '7000', pillion.dev/outbound-port: '9001', pillion.dev/health: '[::]:9020'}}\n" +
		"spec: {securityContext: {runAsUser: 1666}, containers: [{name: a, ports: [{containerPort: 16001}, {containerPort: 16020}]}]}\n"
	injected, err := inject("f.yaml", []byte(text), settings())
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"--proxy-uid=7000"`, `"--outbound-port=9001"`, `"runAsUser":7000`, `"port":9020`} {
		if !strings.Contains(string(injected), want) {
			t.Errorf("%s is not in\n%s", want, injected)
		}
	}
}

// FuzzInject: nothing makes it panic, and what it writes it takes out.
func FuzzInject(f *testing.F) {
	for _, text := range corpus(f) {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		clean, err := Uninject("fuzz", text)
		if err != nil {
			return
		}
		for _, s := range manners() {
			injected, err := inject("fuzz", clean, s)
			if err != nil {
				return
			}
			back, err := Uninject("fuzz", injected)
			if err != nil || !bytes.Equal(back, clean) {
				t.Errorf("%v\n%q\ninjected\n%q\ntaken out\n%q", err, clean, injected, back)
			}
		}
	})
}
