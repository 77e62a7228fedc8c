// SPDX-License-Identifier: Apache-2.0

package debian

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

const (
	// nodeRelease is the Debian whose packages Unpack takes: the newest stable one.
	nodeRelease = "trixie"
	// nodeFresh is how long an unpacked folder is not made anew.
	nodeFresh = 7 * 24 * time.Hour
)

// Unpack returns a folder with the content of packages and of all that they depend on, as they are before anything of them
// is set up. It is kept in the store; refresh makes it anew. Nobody else may write to it.
func (s *Store) Unpack(ctx context.Context, packages []string, refresh bool) (dir string, err error) {
	hash := sha256.Sum256([]byte(s.mirrors.nodeSources() + strings.Join(packages, " ")))
	dir = filepath.Join(s.dir, "node", fmt.Sprintf("%x", hash[:8]))
	info, err := os.Stat(dir)
	if err == nil && !refresh && time.Since(info.ModTime()) < nodeFresh {
		return dir, nil
	}
	there := err == nil
	if err := s.unpack(ctx, packages, dir); err != nil {
		if !there || ctx.Err() != nil {
			return "", fullDisk(err)
		}
		s.say("this goes on with the packages of %s:\n%v", info.ModTime().Format(time.DateOnly), err)
	}
	return dir, nil
}

// unpack downloads, unpacks beside the place, and moves it there. Folders of other lists go: there is one that is used.
func (s *Store) unpack(ctx context.Context, packages []string, dir string) error {
	began := time.Now()
	s.say("downloading %d packages of Debian %s and what they depend on", len(packages), nodeRelease)
	a, err := newAPT(filepath.Join(s.dir, "apt-node"), s.mirrors.nodeSources())
	if err != nil {
		return err
	}
	if _, err := a.run(a.command(ctx, "apt-get", "update")); err != nil {
		return noArchive(err)
	}
	// apt checks each file against the signed lists.
	if _, err := a.run(a.command(ctx, "apt-get", append([]string{"install", "--yes", "--no-install-recommends", "--download-only"}, packages...)...)); err != nil {
		return noPackage(err)
	}
	archives := filepath.Join(a.dir, "cache/archives")
	defer os.RemoveAll(archives)
	debs, _ := filepath.Glob(filepath.Join(archives, "*.deb"))
	if len(debs) < len(packages) {
		return fmt.Errorf("apt-get left %d packages, want at least %d", len(debs), len(packages))
	}
	made := filepath.Join(s.dir, "node.new")
	if err := errors.Join(os.RemoveAll(made), os.Mkdir(made, 0o755)); err != nil {
		return err
	}
	defer os.RemoveAll(made)
	for _, deb := range debs {
		if out, err := exec.CommandContext(ctx, "dpkg-deb", "--extract", deb, made).CombinedOutput(); err != nil {
			return fmt.Errorf("unpack %s: %w: %s", filepath.Base(deb), err, out)
		}
	}
	// dpkg-deb gave the folder a time of its own. Of other lists none is kept.
	if err := errors.Join(os.Chtimes(made, time.Time{}, time.Now()), os.RemoveAll(filepath.Dir(dir)), os.Mkdir(filepath.Dir(dir), 0o755), os.Rename(made, dir)); err != nil {
		return err
	}
	s.say("%d packages downloaded and unpacked in %.1f s", len(debs), time.Since(began).Seconds())
	return nil
}
