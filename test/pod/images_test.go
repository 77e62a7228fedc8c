// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Images of these tests. No registry has them.
const (
	pillionImage = "localhost/pillion-test:plain"
	webImage     = "localhost/pillion-test-web"
	shellImage   = "localhost/pillion-test-shell"
)

// buildImages fills the store: Pillion's own images by `make image`, and two of programs that others wrote.
func (s *store) buildImages(tree string) error {
	if err := s.makeImage(tree, pillionImage); err != nil {
		return err
	}
	return s.buildOthers()
}

// loadImages is the same where Pillion's own images were built before, by scripts/vm.sh.
func (s *store) loadImages(archive string) error {
	if _, err := s.podman("load", "--quiet", "--input="+archive); err != nil {
		return err
	}
	return s.buildOthers()
}

func (s *store) buildOthers() error {
	for _, image := range []struct {
		name     string
		programs []string
	}{
		{webImage, []string{"/usr/sbin/nginx"}},
		{shellImage, []string{"/bin/busybox", "/usr/bin/curl"}},
	} {
		if err := s.buildOf(image.name, image.programs); err != nil {
			return fmt.Errorf("image %s: %w", image.name, err)
		}
	}
	return nil
}

// makeImage is `make image` under another name.
func (s *store) makeImage(tree, name string) error {
	make := exec.Command(filepath.Join(tree, "scripts/image.sh"))
	make.Env = append(s.environ("networks"), "IMAGE="+name, "SBOM="+filepath.Join(s.dir, "sbom.json"))
	if out, err := make.CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w\n%s", make.Args, err, out)
	}
	return nil
}

// buildOf builds an image of programs of this host and the libraries that they load.
func (s *store) buildOf(image string, programs []string) error {
	context, err := os.MkdirTemp(s.dir, "context-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(context)
	rootfs := filepath.Join(context, "rootfs")
	for _, dir := range []string{"etc", "srv", "tmp", "var/log/nginx", "var/lib/nginx"} {
		if err := os.MkdirAll(filepath.Join(rootfs, dir), 0o755); err != nil {
			return err
		}
	}
	nginxConf, err := os.ReadFile("testdata/nginx.conf")
	if err != nil {
		return err
	}
	for name, content := range map[string]string{
		"rootfs/etc/passwd":     "root:x:0:0:root:/:/bin/busybox\nnobody:x:65534:65534::/:\n",
		"rootfs/etc/group":      "root:x:0:\nnogroup:x:65534:\n",
		"rootfs/etc/nginx.conf": string(nginxConf),
		"Dockerfile":            "FROM scratch\nCOPY rootfs/ /\n",
	} {
		if err := os.WriteFile(filepath.Join(context, name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(rootfs, "srv/million"), make([]byte, 1_000_000), 0o644); err != nil {
		return err
	}
	if err := os.Chmod(filepath.Join(rootfs, "tmp"), 0o1777); err != nil {
		return err
	}
	for _, program := range programs {
		libraries, _ := exec.Command("ldd", program).Output() // it fails for a static program, which loads none
		for _, file := range append(regexp.MustCompile(`/\S+`).FindAllString(string(libraries), -1), program) {
			if err := copyFile(file, filepath.Join(rootfs, file)); err != nil {
				return err
			}
		}
	}
	_, err = s.podman("build", "--quiet", "--timestamp=0", "--tag="+image, context)
	return err
}

func copyFile(from, to string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o755)
}

// podman runs podman outside of any node.
func (s *store) podman(args ...string) (string, error) {
	cmd := exec.Command("podman", args...)
	cmd.Env = s.environ("networks")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("podman %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// TestImage: the same tree gives the same image, small, of a user who is not root, and says what it is.
func TestImage(t *testing.T) {
	t.Parallel()
	newNode(t)
	const again, most = "localhost/pillion-again:test", 25_000_000
	if err := pods.makeImage(tree, again); err != nil {
		t.Fatal(err)
	}
	type image struct {
		Digest string
		User   string
		Size   int64
		Labels map[string]string
	}
	inspect := func(name string) (images []image) {
		t.Helper()
		out, err := pods.podman("image", "inspect", name)
		if err == nil {
			err = json.Unmarshal([]byte(out), &images)
		}
		if err != nil || len(images) != 1 || images[0].Digest == "" {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
		return images
	}
	for _, flavour := range []string{"", "-iptables"} {
		one, two := inspect(pillionImage + flavour)[0], inspect(again + flavour)[0]
		if one.Digest != two.Digest {
			t.Errorf("%s: %s, made again it is %s", pillionImage+flavour, one.Digest, two.Digest)
		}
		if one.User != "1666:1666" {
			t.Errorf("%s: user %q", pillionImage+flavour, one.User)
		}
		if flavour == "" && one.Size > most {
			t.Errorf("%s: %d bytes, want at most %d", pillionImage, one.Size, most)
		}
		for _, label := range []string{"title", "source", "licenses", "version", "revision"} {
			if one.Labels["org.opencontainers.image."+label] == "" {
				t.Errorf("%s: no label %s", pillionImage+flavour, label)
			}
		}
	}
}
