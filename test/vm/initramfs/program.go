// SPDX-License-Identifier: Apache-2.0

package initramfs

import (
	"bytes"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// libraryDirs are where Debian's linker looks on amd64, and the folders of what programs load by themselves.
var libraryDirs = []string{"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib", "/usr/local/lib"}

// programDirs are searched after PATH: Debian keeps some servers out of a user's.
var programDirs = []string{"/usr/sbin", "/sbin", "/usr/bin", "/bin"}

// FindProgram returns the path of a program of the host; false if it has none.
func FindProgram(name string) (string, bool) {
	if p, err := exec.LookPath(name); err == nil && filepath.IsAbs(p) {
		return p, true
	}
	for _, dir := range programDirs {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p, true
		}
	}
	return "", false
}

// Program adds a program of the host under its own path, with every link on the way to it, its interpreter, and the
// libraries that it is linked with.
func (a *Archive) Program(hostPath string) error {
	for range 10 {
		dir, err := filepath.EvalSymlinks(filepath.Dir(hostPath))
		if err != nil {
			return err
		}
		hostPath = filepath.Join(dir, filepath.Base(hostPath))
		info, err := os.Lstat(hostPath)
		if err != nil {
			return err
		}
		if info.Mode()&os.ModeSymlink == 0 {
			return a.object(hostPath)
		}
		target, err := os.Readlink(hostPath)
		if err != nil {
			return err
		}
		a.Link(hostPath, target)
		if !filepath.IsAbs(target) {
			target = filepath.Join(dir, target)
		}
		hostPath = target
	}
	return fmt.Errorf("%s: too many links", hostPath)
}

// object adds a program or a library, and what it is linked with. A script brings its interpreter.
func (a *Archive) object(file string) error {
	if a.have[place(file)] {
		return nil
	}
	a.Copy(file, file)
	if a.err != nil {
		return a.err
	}
	content, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if script, ok := bytes.CutPrefix(content, []byte("#!")); ok {
		line, _, _ := bytes.Cut(script, []byte("\n"))
		if fields := strings.Fields(string(line)); len(fields) > 0 {
			return a.Program(fields[0])
		}
		return nil
	}
	f, err := elf.NewFile(bytes.NewReader(content))
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	for _, segment := range f.Progs {
		if segment.Type != elf.PT_INTERP {
			continue
		}
		name := make([]byte, segment.Filesz)
		if _, err := segment.ReadAt(name, 0); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		if err := a.Program(strings.TrimRight(string(name), "\x00")); err != nil {
			return err
		}
	}
	needed, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	dirs := libraryDirs
	if runpath, err := f.DynString(elf.DT_RUNPATH); err == nil && len(runpath) > 0 {
		dirs = slices.Concat(strings.Split(strings.ReplaceAll(runpath[0], "$ORIGIN", filepath.Dir(file)), ":"), dirs)
	}
	for _, name := range needed {
		found := false
		for _, dir := range dirs {
			library := filepath.Join(dir, name)
			if _, err := os.Stat(library); err == nil {
				if err := a.Program(library); err != nil {
					return err
				}
				found = true
				break
			}
		}
		if !found {
			return fmt.Errorf("%s: its library %s is not found", file, name)
		}
	}
	return nil
}

// Plugins adds the shared objects of a folder, such as those that iptables loads by name, and what they are linked with.
// That there are none is no error.
func (a *Archive) Plugins(dir string) error {
	files, _ := filepath.Glob(filepath.Join(dir, "*.so"))
	for _, file := range files {
		if err := a.Program(file); err != nil {
			return err
		}
	}
	return nil
}
