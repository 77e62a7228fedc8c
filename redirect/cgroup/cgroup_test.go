// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"os"
	"strings"
	"testing"

	"github.com/pillionproxy/pillion/config"
)

func TestPodAboveAContainer(t *testing.T) {
	const (
		uid     = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"
		escaped = "0f1e2d3c_4b5a_6978_8796_a5b4c3d2e1f0"
		hex     = "0f1e2d3c4b5a69788796a5b4c3d2e1f0"
	)
	id := strings.Repeat("ab", 32)
	// The pod of each is what stands before the "|".
	for _, path := range []string{
		"/kubepods/burstable/pod" + uid + "|/" + id,
		"/kubepods/pod" + uid + "|",
		"/kubepods/besteffort/pod" + hex + "|/" + id + "/container",
		"/kubepods/burstable/podof-a-file|/crio-" + id,
		"/kubepods/burstable/pod" + uid + "|/pod" + uid,
		"/kubepods/burstable/pod" + uid + "|/burstable/pod" + uid,
		"/kubepods.slice/kubepods-pod" + escaped + ".slice|/cri-containerd-ab.scope",
		"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + hex + ".slice|/crio-ab.scope/container",
		"/kubepods-burstable-pod" + escaped + ".slice|/cri-containerd-ab.scope", // only a part of the hierarchy is mounted
		"/a.slice/a-kubepods.slice/a-kubepods-besteffort.slice/a-kubepods-besteffort-pod" + escaped + ".slice|/x/y",
		"/kubepods/pod" + uid + "/" + id + "/kubelet/kubepods/pod" + hex + "|/" + id,
		"/kubepods.slice/kubepods-pod" + escaped + ".slice/cri-containerd-ab.scope/kubelet/kubepods/burstable/pod" + uid + "|/" + id,
		"/kubepods.slice/kubepods-pod" + escaped + ".slice|/cri-containerd-ab.scope/docker/" + id,
		"/kubepods/pod" + uid + "|/kubepods-pod" + escaped + ".slice", // in no kubepods.slice
		"/machine.slice/libpod_pod_" + id + ".slice|/libpod-cd.scope",
		"/user.slice/user-1000.slice/user@1000.service/user.slice/user-libpod_pod_" + id + ".slice|/libpod-cd.scope/container",
		"/libpod_parent/" + id + "|/libpod-cd",
		"/shop/" + id + "|/libpod-cd/container",
		// Those have none: others' containers lie beside them.
		"|/libpod_parent/libpod-" + id,
		"|/docker/" + id,
		"|/system.slice/docker-" + id + ".scope",
		"|/system.slice/containerd.service/kubepods-burstable-pod" + escaped + ".slice:cri-containerd:" + id,
		"|/kubepods/burstable/" + id,
		"|/kubepods/pod",
		"|/burstable/pod" + uid,
		"|/shop/app",
		"|/app",
		"|/",
		"|",
	} {
		want, _, _ := strings.Cut(path, "|")
		if got := podAbove(strings.Replace(path, "|", "", 1)); got != want {
			t.Errorf("pod above %s: %q, want %q", path, got, want)
		}
	}
}

// TestPathUnderAMount: what lies above our cgroup namespace has no name, so that no path says where it is.
func TestPathUnderAMount(t *testing.T) {
	for _, tt := range []struct{ root, name, want string }{
		{"/", "/", "/m"},
		{"/", "/a/b", "/m/a/b"},
		{"/a", "/a", "/m"},
		{"/a", "/a/b", "/m/b"},
		{"/a", "/ab", ""},
		{"/a", "/", ""},
		{"/", "/../a", ""},
		{"/..", "/", ""},
		{"/../..", "/a", ""},
		{"/..", "/../a", "/m/a"},
		{"/..", "/../../a", ""},
	} {
		m := Mount{Point: "/m", Root: tt.root}
		if got, ok := m.path(tt.name); got != tt.want || ok != (tt.want != "") {
			t.Errorf("cgroup %s under a mount of %s: %q, want %q", tt.name, tt.root, got, tt.want)
		}
	}
}

func TestOpenRefusesWhatIsNoCgroup2(t *testing.T) {
	for _, path := range []string{t.TempDir(), "/does/not/exist", "/proc"} {
		d, err := Open(path)
		if err == nil {
			d.Close()
			t.Errorf("%s is taken for a cgroup2 directory", path)
			continue
		}
		if config.ExitOf(err) != config.ExitConfig || config.HintOf(err) == "" {
			t.Errorf("%s: exit %d, hint %q; want a configuration fault with a hint", path, config.ExitOf(err), config.HintOf(err))
		}
	}
}

func TestAnIDIsFoundAgain(t *testing.T) {
	own, err := OwnDir()
	if err != nil {
		t.Skipf("no cgroup2 here: %v", err)
	}
	defer own.Close()
	path := PathOf(own.ID)
	again, err := os.Stat(path)
	if err != nil {
		t.Fatalf("path of cgroup %d: %q: %v", own.ID, path, err)
	}
	if first, _ := os.Stat(own.Path); !os.SameFile(first, again) {
		t.Errorf("path of cgroup %d: %s, want %s", own.ID, path, own.Path)
	}
	if path := PathOf(1 << 60); path != "" {
		t.Errorf("a cgroup that does not exist is found at %s", path)
	}
}
