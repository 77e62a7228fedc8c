// SPDX-License-Identifier: Apache-2.0

package debian

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/config"
	"golang.org/x/sys/unix"
)

// nowhere are mirrors at which nobody listens.
var nowhere = Mirrors{Main: "http://127.0.0.1:1/debian", Security: "http://127.0.0.1:1/debian-security"}

// log collects what a store says.
type log struct{ lines []string }

func (l *log) say(format string, args ...any) {
	l.lines = append(l.lines, fmt.Sprintf(format, args...))
}

func (l *log) has(t *testing.T, what string) {
	t.Helper()
	if !strings.Contains(strings.Join(l.lines, "\n"), what) {
		t.Errorf("nothing is said of %q: %q", what, l.lines)
	}
}

// filled makes a store with one kernel in it, asked for some time ago.
func filled(t *testing.T, age time.Duration) (dir string, r Release) {
	t.Helper()
	if _, err := exec.LookPath("apt-get"); err != nil {
		t.Skip("this test needs apt-get: kernels come by it")
	}
	if _, err := os.Stat(keyring); err != nil {
		t.Skip("this test needs the package debian-archive-keyring")
	}
	dir = t.TempDir()
	content := []byte("a package")
	sum := sha256.Sum256(content)
	r = Release{Series: "5.10", Version: "5.10.262-1", Packages: []Package{{Name: "linux-image", Version: "5.10.262-1", SHA256: hex.EncodeToString(sum[:])}}}
	b, err := json.Marshal(index{Made: time.Now().Add(-age), Sources: nowhere.sources(), Releases: []Release{r}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "deb"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{"index.json": b, "deb/" + r.Packages[0].file(): content} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir, r
}

func open(t *testing.T, dir string, l *log) *Store {
	t.Helper()
	s, err := Open(t.Context(), dir, nowhere, false, l.say)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func TestWarmCacheAsksNobody(t *testing.T) {
	dir, r := filled(t, time.Hour)
	var l log
	s := open(t, dir, &l)
	files, err := s.Fetch(t.Context(), r)
	if err != nil || len(files) != 1 || len(l.lines) > 0 {
		t.Errorf("files %v, error %v, said %q", files, err, l.lines)
	}
	if _, err := s.Find("4.19"); err == nil || !strings.Contains(config.HintOf(err), "5.10") {
		t.Errorf("4.19: %v (%s), want that there is 5.10", err, config.HintOf(err))
	}
	if got, err := s.Find(Newest); err != nil || got.Series != "5.10" {
		t.Errorf("newest: %+v, %v", got, err)
	}
}

// TestWithoutANetworkTheLastAnswerCounts: loudly.
func TestWithoutANetworkTheLastAnswerCounts(t *testing.T) {
	dir, r := filled(t, 100*time.Hour)
	var l log
	if _, err := open(t, dir, &l).Fetch(t.Context(), r); err != nil {
		t.Error(err)
	}
	l.has(t, "cannot be asked")
}

func TestNoNetworkAndNoCache(t *testing.T) {
	filled(t, 0)
	var l log
	_, err := Open(t.Context(), t.TempDir(), nowhere, false, l.say)
	if err == nil || !strings.Contains(config.HintOf(err), MainVariable) {
		t.Fatalf("got %v, hint %q, want a hint at the mirrors", err, config.HintOf(err))
	}
	if !strings.Contains(err.Error(), "127.0.0.1") {
		t.Errorf("the error does not say who was asked: %v", err)
	}
}

// TestDamagedPackageIsNotHandedOut: it is fetched again; where that fails, the error says so, and nothing half is left.
func TestDamagedPackageIsNotHandedOut(t *testing.T) {
	dir, r := filled(t, time.Hour)
	file := filepath.Join(dir, "deb", r.Packages[0].file())
	if err := os.WriteFile(file, []byte("a packagE"), 0o644); err != nil {
		t.Fatal(err)
	}
	var l log
	files, err := open(t, dir, &l).Fetch(t.Context(), r)
	if err == nil {
		t.Fatalf("handed out %v", files)
	}
	l.has(t, "damaged")
	left, _ := filepath.Glob(filepath.Join(dir, "deb", ".new-*"))
	if len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestDamagedIndexIsMadeAnew(t *testing.T) {
	dir, _ := filled(t, time.Hour)
	if err := os.WriteFile(filepath.Join(dir, "index.json"), []byte(`{"made":`), 0o644); err != nil {
		t.Fatal(err)
	}
	var l log
	if _, err := Open(t.Context(), dir, nowhere, false, l.say); err == nil {
		t.Error("a damaged index was taken for one")
	}
	l.has(t, "asking the archive")
}

// TestFullDisk: a file system of one megabyte.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("this test needs root: it mounts a small file system")
	}
	filled(t, 0)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile(filepath.Join(dir, "filler"), make([]byte, 48<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "index.json")
	err := fullDisk(writeFile(file, make([]byte, 64<<10)))
	if err == nil || !strings.Contains(config.HintOf(err), "full") {
		t.Errorf("got %v, hint %q", err, config.HintOf(err))
	}
	left, _ := os.ReadDir(dir)
	if len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
}

func TestPruneKeepsWhatTheArchiveHas(t *testing.T) {
	dir, r := filled(t, time.Hour)
	s := open(t, dir, &log{})
	for _, name := range []string{"old.deb", ".new-1/x.deb"} {
		p := filepath.Join(dir, "deb", name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.prune(); err != nil {
		t.Fatal(err)
	}
	left, _ := os.ReadDir(filepath.Join(dir, "deb"))
	if len(left) != 1 || left[0].Name() != r.Packages[0].file() {
		t.Errorf("left: %v", left)
	}
}
