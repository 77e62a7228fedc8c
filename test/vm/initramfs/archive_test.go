// SPDX-License-Identifier: Apache-2.0

package initramfs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/cavaliergopher/cpio"
	"github.com/google/go-cmp/cmp"
)

// entries reads an archive back: "mode name" or "mode name -> target" each.
func entries(t *testing.T, archive []byte) (list []string) {
	t.Helper()
	for r := cpio.NewReader(bytes.NewReader(archive)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return list
		}
		if err != nil {
			t.Fatal(err)
		}
		line := fmt.Sprintf("%#o %s", int64(h.Mode), h.Name)
		if h.Linkname != "" {
			line += " -> " + h.Linkname
		}
		list = append(list, line)
	}
}

func TestParentsComeFirstAndOnce(t *testing.T) {
	var b bytes.Buffer
	a := New(&b)
	a.File("/bin/x", 0o755, []byte("one"))
	a.File("/usr/bin/x", 0o644, []byte("the same place"))
	a.Dir("/tmp", 0o777|os.ModeSticky)
	a.File("/etc/deep/file", 0o600, nil)
	a.Link("/etc/link", "deep/file")
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	got := entries(t, b.Bytes())[9:] // after usr and the merged folders and links
	want := []string{"0100755 usr/bin/x", "041777 tmp", "040755 etc", "040755 etc/deep", "0100600 etc/deep/file", "0120777 etc/link -> deep/file"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("entries (-want +got):\n%s", diff)
	}
	if b.Len()%4 != 0 {
		t.Errorf("%d bytes: another archive could not follow", b.Len())
	}
}

// TestProgramRunsFromTheArchive: what is packed of a program suffices to run it with nothing else in sight.
func TestProgramRunsFromTheArchive(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("this test needs root: it changes the root folder")
	}
	program, ok := FindProgram("sh")
	if !ok {
		t.Skip("no sh here")
	}
	var b bytes.Buffer
	a := New(&b)
	if err := errors.Join(a.Program(program), a.Close()); err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	for r := cpio.NewReader(&b); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(root, h.Name)
		switch {
		case h.Mode.IsDir():
			err = os.MkdirAll(file, 0o755)
		case h.Linkname != "":
			err = os.Symlink(h.Linkname, file)
		default:
			var content []byte
			if content, err = io.ReadAll(r); err == nil {
				err = os.WriteFile(file, content, 0o755)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("/bin/sh", "-c", "echo well")
	cmd.Dir, cmd.SysProcAttr = "/", &syscall.SysProcAttr{Chroot: root}
	out, err := cmd.CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != "well" {
		t.Errorf("%v: %s", err, out)
	}
}

func TestMissingLibraryIsNamed(t *testing.T) {
	a := New(io.Discard)
	if err := a.Program(filepath.Join(t.TempDir(), "nothing")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want that it does not exist", err)
	}
	if _, ok := FindProgram("no-such-program-anywhere"); ok {
		t.Error("found what there is not")
	}
	if !slices.Contains(libraryDirs, "/lib64") {
		t.Error("the linker itself lies in /lib64")
	}
}
