// SPDX-License-Identifier: Apache-2.0

package kernel

import (
	"archive/tar"
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/ulikunitz/xz"
)

func TestOrder(t *testing.T) {
	x := NewIndex([]Module{
		{Name: "x_tables"},
		{Name: "ip_tables", Needs: []string{"x_tables"}},
		{Name: "nf_nat", Needs: []string{"nf_conntrack"}},
		{Name: "nf_conntrack"},
		{Name: "iptable_nat", Needs: []string{"ip_tables", "nf_nat"}},
		{Name: "veth", Aliases: []string{"rtnl-link-veth"}},
		{Name: "aesni", Aliases: []string{"cpu:type:x86,ven*fam*mod*:feature:*0099*", "crypto-aes"}},
		{Name: "tls", Aliases: []string{"tcp-ulp-tls"}},
	})
	for _, x := range []Index{x, ParseIndex(x.String())} {
		for _, tt := range []struct {
			name string
			want []string
		}{
			{"iptable_nat", []string{"x_tables", "ip_tables", "nf_conntrack", "nf_nat", "iptable_nat"}},
			{"iptable-nat", []string{"x_tables", "ip_tables", "nf_conntrack", "nf_nat", "iptable_nat"}},
			{"rtnl-link-veth", []string{"veth"}},
			{"tcp-ulp-tls", []string{"tls"}},
			{"crypto-aes", []string{"aesni"}},
			{"unknown", nil},
		} {
			if diff := cmp.Diff(tt.want, x.Order(tt.name)); diff != "" {
				t.Errorf("%s (-want +got):\n%s", tt.name, diff)
			}
		}
	}
}

func TestModinfo(t *testing.T) {
	info := "license=GPL\x00depends=nf-nat,x_tables\x00softdep=pre: sha1 crc-32 post: never\x00alias=ipt_REDIRECT\x00alias=odd one\x00depends=\x00"
	needs, aliases := parseModinfo([]byte(info))
	if diff := cmp.Diff([]string{"nf_nat", "x_tables", "sha1", "crc_32"}, needs); diff != "" {
		t.Errorf("needs (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"ipt_REDIRECT"}, aliases); diff != "" {
		t.Errorf("aliases (-want +got):\n%s", diff)
	}
}

func TestWanted(t *testing.T) {
	for file, want := range map[string]bool{
		"net/sched/sch_ingress.ko": true, "drivers/net/veth.ko.xz": true, "net/netfilter/xt_TPROXY.ko.xz": true,
		"net/bluetooth/bluetooth.ko": false, "drivers/gpu/drm/drm.ko": false, "net/README": false,
	} {
		if got := wanted(file); got != want {
			t.Errorf("%s: %v", file, got)
		}
	}
}

// TestNotAModule: what is no module, and what is compressed in an unknown way, is an error that names the file.
func TestNotAModule(t *testing.T) {
	var packed bytes.Buffer
	w, err := xz.NewWriter(&packed)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("no ELF")); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	for file, content := range map[string][]byte{
		"a.ko": []byte("no ELF"), "b.ko.xz": packed.Bytes(), "c.ko.xz": packed.Bytes()[:20], "d.ko.zst": nil,
	} {
		if _, err := readModule(file, content); err == nil || !strings.Contains(err.Error(), file) {
			t.Errorf("%s: %v", file, err)
		}
	}
}

func TestDamagedPackage(t *testing.T) {
	if _, err := exec.LookPath("dpkg-deb"); err != nil {
		t.Skip("this test needs dpkg-deb: kernels come in its packages")
	}
	file := filepath.Join(t.TempDir(), "x.deb")
	if err := os.WriteFile(file, []byte("!<arch>\ncut"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(file); err == nil || !strings.Contains(err.Error(), "x.deb") {
		t.Errorf("got %v, want an error that names the package", err)
	}
}

// TestImageIsFoundWhereverItLies: /boot until 6.18, beside the modules since.
func TestImageIsFoundWhereverItLies(t *testing.T) {
	for _, name := range []string{"./boot/vmlinuz-5.10.0-46-cloud-amd64", "./usr/lib/modules/7.3.4+deb13-cloud-amd64/vmlinuz"} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Size: 5}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte("image")); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		var k Kernel
		if err := k.readTar(&b); err != nil || string(k.Image) != "image" {
			t.Errorf("%s: %q, %v", name, k.Image, err)
		}
	}
}
