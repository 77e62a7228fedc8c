// SPDX-License-Identifier: Apache-2.0

// Package initramfs writes the file system that a kernel unpacks into memory before it starts its first process, as a
// cpio archive of the format newc.
//
// What always holds: an archive has the parents of everything in it, each once; and its layout is that of a merged /usr,
// whatever the host's is.
package initramfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cavaliergopher/cpio"
)

// Archive is an archive that is being written. Its first error stays, and Close returns it.
type Archive struct {
	w    *cpio.Writer
	have map[string]bool
	err  error
}

// merged are the links by which a merged /usr is reached. Debian has been so since 12.
var merged = []string{"bin", "sbin", "lib", "lib64"}

// New starts an archive.
func New(w io.Writer) *Archive {
	a := &Archive{w: cpio.NewWriter(w), have: map[string]bool{".": true}}
	for _, name := range merged {
		a.Dir("/usr/"+name, 0o755)
		a.Link("/"+name, "usr/"+name)
	}
	return a
}

// Close ends the archive. The kernel reads one archive after another, so another may follow.
func (a *Archive) Close() error {
	if err := a.w.Close(); a.err == nil {
		a.err = err
	}
	return a.err
}

// place is where a path goes in an archive: without the leading slash, and below usr/ where the link leads there.
func place(name string) string {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	first, rest, below := strings.Cut(name, "/")
	for _, m := range merged {
		if first == m && below {
			return "usr/" + m + "/" + rest
		}
	}
	if name == "" {
		return "."
	}
	return name
}

// start begins an entry, after its parents. False: it is there already, or an earlier error stands.
func (a *Archive) start(h *cpio.Header) bool {
	if a.err != nil || a.have[h.Name] {
		return false
	}
	a.Dir("/"+path.Dir(h.Name), 0o755)
	a.have[h.Name] = true
	if err := a.w.WriteHeader(h); err != nil && a.err == nil {
		a.err = fmt.Errorf("archive %s: %w", h.Name, err)
	}
	return a.err == nil
}

// Dir adds a directory. One that is there already keeps its mode.
func (a *Archive) Dir(name string, mode fs.FileMode) {
	sticky := cpio.FileMode(0)
	if mode&fs.ModeSticky != 0 {
		sticky = cpio.ModeSticky
	}
	a.start(&cpio.Header{Name: place(name), Mode: cpio.TypeDir | sticky | cpio.FileMode(mode.Perm()), Links: 2})
}

// File adds a file, unless it is there already.
func (a *Archive) File(name string, mode fs.FileMode, content []byte) {
	if a.start(&cpio.Header{Name: place(name), Mode: cpio.TypeReg | cpio.FileMode(mode.Perm()), Size: int64(len(content))}) {
		a.write(name, content)
	}
}

// Link adds a symbolic link, unless something of that name is there.
func (a *Archive) Link(name, target string) {
	if a.start(&cpio.Header{Name: place(name), Mode: cpio.TypeSymlink | 0o777, Size: int64(len(target))}) {
		a.write(name, []byte(target))
	}
}

func (a *Archive) write(name string, content []byte) {
	if _, err := a.w.Write(content); err != nil {
		a.err = fmt.Errorf("archive %s: %w", name, err)
	}
}

// Copy adds a file of the host, with its mode, under the given name.
func (a *Archive) Copy(name, hostPath string) {
	if a.err != nil || a.have[place(name)] {
		return
	}
	content, err := os.ReadFile(hostPath)
	var info fs.FileInfo
	if err == nil {
		info, err = os.Stat(hostPath)
	}
	if err != nil {
		a.err = err
		return
	}
	a.File(name, info.Mode(), content)
}

// Tree adds a folder of the host and what is below it, under the given name, but for the folders below it that are to be
// skipped: directories, links as they are, and regular files. That there is none is no error.
func (a *Archive) Tree(name, hostPath string, skip ...string) {
	err := filepath.WalkDir(hostPath, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(hostPath, p)
		if err != nil {
			return err
		}
		switch to := path.Join(name, filepath.ToSlash(rel)); {
		case d.IsDir() && slices.Contains(skip, filepath.ToSlash(rel)):
			return filepath.SkipDir
		case d.IsDir():
			a.Dir(to, 0o755)
		case d.Type().IsRegular():
			a.Copy(to, p)
		case d.Type() == fs.ModeSymlink:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			a.Link(to, target)
		}
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) && a.err == nil {
		a.err = err
	}
}
