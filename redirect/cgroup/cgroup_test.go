// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"os"
	"strings"
	"testing"

	"github.com/pillionproxy/pillion/config"
)

func TestPodAboveAContainer(t *testing.T) {
	const uid = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"
	for container, want := range map[string]string{
		// systemd driver, containerd and CRI-O; the latter's runtime may add a level of its own
		"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0f1e2d3c_4b5a.slice/cri-containerd-ab.scope": "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0f1e2d3c_4b5a.slice",
		"/kubepods.slice/kubepods-pod0f1e2d3c_4b5a.slice/crio-ab.scope/container":                                    "/kubepods.slice/kubepods-pod0f1e2d3c_4b5a.slice",
		"/kubepods/besteffort/pod" + uid + "/ab":                                                                     "/kubepods/besteffort/pod" + uid,
		"/machine.slice/libpod_pod_" + strings.Repeat("ab", 32) + ".slice/libpod-cd.scope":                           "/machine.slice/libpod_pod_" + strings.Repeat("ab", 32) + ".slice",
		"/libpod_parent/" + strings.Repeat("ab", 32) + "/libpod-cd":                                                  "/libpod_parent/" + strings.Repeat("ab", 32),
		"/shop/app": "/shop",
		"/app":      "",
	} {
		if got := podAbove(container); got != want {
			t.Errorf("pod above %s: %q, want %q", container, got, want)
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
