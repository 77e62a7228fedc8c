// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// variants are the ways to write the pod that podman can run: it knows no native sidecars.
var variants = []string{"privileged", "least", "unprivileged-proxy"}

// variant are the flags of one. The seccomp profile of podman 4.3 allows bpf(2) to CAP_SYS_ADMIN alone; later ones allow
// it to CAP_BPF.
func variant(v string) []string {
	profile, _ := os.ReadFile("/usr/share/containers/seccomp.json")
	if v == "least" && !strings.Contains(string(profile), "CAP_BPF") {
		return []string{"--variant=least", "--init-seccomp=Unconfined"}
	}
	return []string{"--variant=" + v}
}

// inject renders testdata/NAME.yaml with the sidecar in it.
func (n *node) inject(name string, args ...string) string {
	n.t.Helper()
	return n.injectYAML(n.read(name), args...)
}

// read is testdata/NAME.yaml.
func (n *node) read(name string) string {
	n.t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name+".yaml"))
	if err != nil {
		n.t.Fatal(err)
	}
	return string(b)
}

func (n *node) injectYAML(manifest string, args ...string) string {
	n.t.Helper()
	r := n.run(manifest, pillionPath, append([]string{"inject", "--image=" + pillionImage, "--sidecar=ordinary", "--node-name=false"}, append(args, "-")...)...)
	n.must(r)
	return r.stdout // and not its warnings
}

// start plays an injected pod and waits until its sidecar is ready.
func (n *node) start(number int, name, manifest string) *pod {
	n.t.Helper()
	p, r := n.play(number, name, manifest)
	if r.code != 0 {
		n.t.Fatalf("kube play: exit code %d\n%s\ninit said\n%s\n%s", r.code, r.out, p.podman("logs", p.container("pillion-init")).out, manifest)
	}
	p.waitStatus("app", "running")
	p.waitLog("pillion", "ready: own dials do not come back")
	return p
}

// TestPodsTalk: two pods that know nothing of it talk through both sidecars, over both families, and each app sees true
// addresses; the sidecars log and count it, and are healthy. When the pods are gone the node is as it was before.
func TestPodsTalk(t *testing.T) {
	for _, v := range variants {
		t.Run(v, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			before := n.state()
			web := n.start(2, "web", n.inject("web", variant(v)...))
			client := n.start(3, "client", n.inject("client", variant(v)...))
			for _, f := range []struct{ url, client, web string }{
				{"http://" + web.ip4, client.ip4, web.ip4},
				{"http://[" + web.ip6 + "]", client.ip6, web.ip6},
			} {
				sees := f.client
				if v == "unprivileged-proxy" {
					sees = f.web // a sidecar without any capability dials in its own name
				}
				want := sees + " came to " + f.web + "\n" + f.client + " to " + f.web + ":80\n"
				if got := n.must(client.curl(f.url)); got != want {
					t.Errorf("%s: %q, want %q", f.url, got, want)
				}
				for _, side := range []struct {
					*pod
					direction string
				}{{client, "outbound"}, {web, "inbound"}} {
					side.waitLog("pillion", `"direction":"`+side.direction+`"`)
				}
			}
			for _, p := range []*pod{web, client} {
				for _, path := range []string{"/healthz/live", "/healthz/ready"} {
					n.must(n.run("", "curl", "-fsS", "--max-time", "20", "http://"+p.ip4+":16020"+path))
				}
				metrics := n.must(n.run("", "curl", "-fsS", "--max-time", "20", "http://"+p.ip4+":16020/metrics"))
				if !strings.Contains(metrics, "pillion_connections_opened_total{") {
					t.Errorf("%s counts no connections:\n%s", p.name, metrics)
				}
			}
			client.down()
			web.down()
			if diff := cmp.Diff(before, n.state()); diff != "" {
				t.Errorf("the node is not as it was (-before +after):\n%s", diff)
			}
		})
	}
}
