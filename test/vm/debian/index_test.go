// SPDX-License-Identifier: Apache-2.0

package debian

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestVersionsCompareAsDpkgSays: the order of kernels is dpkg's.
func TestVersionsCompareAsDpkgSays(t *testing.T) {
	versions := []string{
		"5.10.262-1", "5.10.99-1", "6.1.192-2", "6.1.192-10", "6.12.117-1", "6.12.117-1~deb12u1", "6.12.117-1~bpo13+1",
		"7.3.4-1~bpo13+1", "7.3~rc7-1~exp1", "7.3-1", "6.12.115+deb13.1-1", "6.12.115+deb13-1", "6.18.05-1", "6.18.5-1", "1a", "1.", "1",
	}
	_, err := exec.LookPath("dpkg")
	for _, a := range versions {
		for _, b := range versions {
			got := compareVersions(a, b)
			if got != -compareVersions(b, a) {
				t.Errorf("%s and %s: the order is not one", a, b)
			}
			if err != nil {
				continue
			}
			operator := map[int]string{-1: "lt", 0: "eq", 1: "gt"}[got]
			if exec.Command("dpkg", "--compare-versions", a, operator, b).Run() != nil {
				t.Errorf("%s %s %s, dpkg says otherwise", a, operator, b)
			}
		}
	}
	if err != nil {
		t.Log("dpkg is not here: its word was not asked for")
	}
}

// paragraph is one package as `apt-cache show` prints it.
func paragraph(name, version string, size int) string {
	return fmt.Sprintf("Package: %s\nVersion: %s\nDepends: kmod,\n more\nSize: %d\nSHA256: %x\n\n", name, version, size, name+version)
}

func TestNewestOfEachSeries(t *testing.T) {
	const big, empty = 20 << 20, 1916
	show := strings.Join([]string{
		paragraph("linux-image-5.10.0-9-cloud-amd64", "5.10.70-1", big),
		paragraph("linux-image-5.10.0-46-cloud-amd64", "5.10.262-1", big),
		paragraph("linux-image-6.12.117+deb12-cloud-amd64", "6.12.117-1~deb12u1", big),
		paragraph("linux-image-6.12.117+deb13-cloud-amd64", "6.12.117-1", big),
		paragraph("linux-image-6.12.118+deb13-amd64", "6.12.118-1", big),
		paragraph("linux-image-7.1.3+deb13-cloud-amd64", "7.1.3-1", empty),
		paragraph("linux-binary-7.1.3+deb13-cloud-amd64", "7.1.3-1", big), // whose modules are gone
		paragraph("linux-image-7.3.4+deb13-cloud-amd64", "7.3.4-1~bpo13+1", empty),
		paragraph("linux-binary-7.3.4+deb13-cloud-amd64", "7.3.4-1~bpo13+1", big),
		paragraph("linux-modules-7.3.4+deb13-cloud-amd64", "7.3.4-1~bpo13+1", big),
		paragraph("linux-binary-unsigned-7.3.5+deb13-cloud-amd64", "7.3.5-1", big),
		strings.TrimRight(paragraph("linux-image-cloud-amd64", "6.12.118-1", big), "\n"),
	}, "")
	var got []string
	for _, r := range newest(parsePackages([]byte(show))) {
		var names []string
		for _, p := range r.Packages {
			names = append(names, p.Name)
		}
		got = append(got, r.Series+" "+r.Version+": "+strings.Join(names, " "))
	}
	want := []string{
		"5.10 5.10.262-1: linux-image-5.10.0-46-cloud-amd64",
		"6.12 6.12.117-1: linux-image-6.12.117+deb13-cloud-amd64",
		"7.3 7.3.4-1~bpo13+1: linux-binary-7.3.4+deb13-cloud-amd64 linux-modules-7.3.4+deb13-cloud-amd64",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestMirrorsComeFromWhatIsSetUp(t *testing.T) {
	m := Mirrors{Security: "http://given/security"}
	m.addFrom("Debian|bookworm|http://mirror/debian/\nOther|x|http://other/\n|y|http://none/\nDebian|bookworm-security|http://mirror/security/\nDebian|trixie|http://second/debian/\n")
	if want := (Mirrors{Main: "http://mirror/debian", Security: "http://given/security"}); m != want {
		t.Errorf("got %+v, want %+v", m, want)
	}
	lines := strings.Split(strings.TrimSpace(m.sources()), "\n")
	if i := slices.IndexFunc(lines, func(l string) bool { return !strings.Contains(l, "signed-by=") }); i >= 0 {
		t.Errorf("%q is not signed", lines[i])
	}
}
