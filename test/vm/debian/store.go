// SPDX-License-Identifier: Apache-2.0

// Package debian finds and fetches the newest kernel of each wanted series from Debian's archive, and programs of it.
//
// What always holds: what the store hands out has the hash that the signed lists of the archive say, checked each time; a
// file is in the cache whole or not at all; the machine's own apt is read and never changed; and a kernel that cannot be
// had is an error that says what to do.
package debian

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pillionproxy/pillion/config"
	"golang.org/x/sys/unix"
)

const (
	// Newest is the name of the newest kernel that the archive has, of whatever series.
	Newest = "newest"
	// fresh is how long the lists are not asked for again.
	fresh = 24 * time.Hour
)

// Store is a cache of kernels in a folder. It is for one process at a time: a second one waits.
type Store struct {
	dir     string
	mirrors Mirrors
	say     func(format string, args ...any)
	lock    *os.File
	index   index
}

// index is what the archive had when it was asked last.
type index struct {
	Made     time.Time `json:"made"`
	Sources  string    `json:"sources"`
	Releases []Release `json:"releases"`
}

// Open opens the store and makes sure that it knows what the archive has: anew if refresh says so or the last answer is a
// day old. Without a network it goes on with the last answer. Close must be called.
func Open(ctx context.Context, dir string, mirrors Mirrors, refresh bool, say func(string, ...any)) (*Store, error) {
	if err := os.MkdirAll(filepath.Join(dir, "deb"), 0o755); err != nil {
		return nil, &config.Fault{Err: fmt.Errorf("make the cache: %w", err), Hint: "choose another folder with -cache, or by XDG_CACHE_HOME"}
	}
	s := &Store{dir: dir, mirrors: mirrors, say: say}
	var err error
	if s.lock, err = lock(filepath.Join(dir, "lock"), say); err != nil {
		return nil, fmt.Errorf("lock the cache: %w", err)
	}
	if err := s.learn(ctx, refresh); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// Close lets another process have the store. Files that were handed out may go from then on.
func (s *Store) Close() { s.lock.Close() }

func lock(path string, say func(string, ...any)) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
		return f, nil
	}
	say("waiting for another run that uses the cache")
	for {
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			return f, err
		}
	}
}

// learn fills the index.
func (s *Store) learn(ctx context.Context, refresh bool) error {
	known := s.load()
	if known == nil && !refresh && time.Since(s.index.Made) < fresh {
		return nil
	}
	made, err := s.ask(ctx)
	if err == nil {
		s.index = made
		b, err := json.MarshalIndent(made, "", "  ")
		if err != nil {
			return err
		}
		if err := writeFile(filepath.Join(s.dir, "index.json"), b); err != nil {
			return fullDisk(fmt.Errorf("write the cache: %w", err))
		}
		return s.prune()
	}
	if known != nil || ctx.Err() != nil {
		return err
	}
	s.say("the archive cannot be asked, so this goes on with what it had %s ago:\n%v", time.Since(s.index.Made).Round(time.Hour), err)
	return nil
}

// load reads the index of an earlier run, if it was of the same sources.
func (s *Store) load() error {
	b, err := os.ReadFile(filepath.Join(s.dir, "index.json"))
	if err != nil {
		return err
	}
	var x index
	if err := json.Unmarshal(b, &x); err != nil {
		return err
	}
	if x.Sources != s.mirrors.sources() || len(x.Releases) == 0 {
		return errors.New("made of other sources")
	}
	s.index = x
	return nil
}

// ask asks the archive what kernels it has.
func (s *Store) ask(ctx context.Context) (index, error) {
	s.say("asking the archive for kernels")
	a, err := newAPT(filepath.Join(s.dir, "apt"), s.mirrors.sources())
	if err != nil {
		return index{}, fullDisk(err)
	}
	if _, err := a.run(a.command(ctx, "apt-get", "update")); err != nil {
		return index{}, noArchive(err)
	}
	var names []string
	for _, prefix := range []string{"linux-image-", "linux-binary-", "linux-modules-"} {
		out, err := a.run(a.command(ctx, "apt-cache", "pkgnames", prefix))
		if err != nil {
			return index{}, err
		}
		for name := range strings.FieldsSeq(string(out)) {
			if strings.HasSuffix(name, "-cloud-amd64") {
				names = append(names, name)
			}
		}
	}
	x := index{Made: time.Now(), Sources: s.mirrors.sources()}
	if len(names) > 0 {
		out, err := a.run(a.command(ctx, "apt-cache", append([]string{"show"}, names...)...))
		if err != nil {
			return index{}, err
		}
		x.Releases = newest(parsePackages(out))
	}
	if len(x.Releases) == 0 {
		return index{}, noArchive(errors.New("the archive has no kernel of the cloud flavour"))
	}
	return x, nil
}

func noArchive(err error) error {
	if isFull(err) {
		return fullDisk(err)
	}
	return &config.Fault{Err: fmt.Errorf("ask the archive: %w", err), Hint: fmt.Sprintf("is there a network? Another mirror is named by %s and %s", MainVariable, SecurityVariable)}
}

// isFull reports whether an error tells of a full disk, apt's word for it included.
func isFull(err error) bool {
	return err != nil && (errors.Is(err, unix.ENOSPC) || strings.Contains(err.Error(), "No space left on device") || strings.Contains(err.Error(), "enough free space"))
}

// fullDisk adds a hint to such an error.
func fullDisk(err error) error {
	if !isFull(err) {
		return err
	}
	return &config.Fault{Err: err, Hint: "the disk of the cache is full: four kernels take 150 MB; choose another with -cache"}
}

// Releases are the newest kernels of every series that the archive has, lowest series first.
func (s *Store) Releases() []Release { return s.index.Releases }

// Find returns the newest kernel of a series, or of all.
func (s *Store) Find(series string) (Release, error) {
	if series == Newest {
		return s.index.Releases[len(s.index.Releases)-1], nil
	}
	var there []string
	for _, r := range s.index.Releases {
		if r.Series == series {
			return r, nil
		}
		there = append(there, r.Series)
	}
	return Release{}, &config.Fault{Err: fmt.Errorf("find kernel %s: the archive does not have it", series), Hint: "there are: " + strings.Join(there, " ")}
}

// Fetch returns the files of a kernel, in the order of its packages: from the cache, if they are there and sound.
func (s *Store) Fetch(ctx context.Context, r Release) (files []string, err error) {
	for _, p := range r.Packages {
		file := filepath.Join(s.dir, "deb", p.file())
		switch err := check(file, p.SHA256); {
		case err == nil:
			files = append(files, file)
			continue
		case !errors.Is(err, os.ErrNotExist):
			s.say("the cache is damaged: %v; fetching it again", err)
		}
		if err := s.download(ctx, p, file); err != nil {
			return nil, fmt.Errorf("fetch kernel %s: %w", r.Version, err)
		}
		files = append(files, file)
	}
	return files, nil
}

// check compares a file with its hash.
func check(file, want string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != want {
		return fmt.Errorf("%s has the hash %.12s…, not %.12s…", filepath.Base(file), got, want)
	}
	return nil
}

// download fetches a package to a folder of its own, checks it, and moves it to its place.
func (s *Store) download(ctx context.Context, p Package, file string) error {
	began := time.Now()
	s.say("downloading %s %s (%d MB)", p.Name, p.Version, p.Size>>20)
	a, err := newAPT(filepath.Join(s.dir, "apt"), s.mirrors.sources())
	if err != nil {
		return fullDisk(err)
	}
	dir, err := os.MkdirTemp(filepath.Join(s.dir, "deb"), ".new-")
	if err != nil {
		return fullDisk(err)
	}
	defer os.RemoveAll(dir)
	cmd := a.command(ctx, "apt-get", "-q", "download", p.Name+"="+p.Version)
	cmd.Dir = dir
	if _, err := a.run(cmd); err != nil {
		return noPackage(err)
	}
	debs, _ := filepath.Glob(filepath.Join(dir, "*.deb"))
	if len(debs) != 1 {
		return fmt.Errorf("apt-get download left %d files, want one", len(debs))
	}
	if err := check(debs[0], p.SHA256); err != nil {
		return fullDisk(err)
	}
	if err := os.Rename(debs[0], file); err != nil {
		return err
	}
	s.say("downloaded in %.1f s", time.Since(began).Seconds())
	return nil
}

func noPackage(err error) error {
	if isFull(err) {
		return fullDisk(err)
	}
	return &config.Fault{Err: err, Hint: "the archive may have moved on since it was asked: try again with -refresh"}
}

// prune removes packages that the archive has replaced, and what a killed run left.
func (s *Store) prune() error {
	var keep []string
	for _, r := range s.index.Releases {
		for _, p := range r.Packages {
			keep = append(keep, p.file())
		}
	}
	entries, err := os.ReadDir(filepath.Join(s.dir, "deb"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !slices.Contains(keep, e.Name()) {
			if err := os.RemoveAll(filepath.Join(s.dir, "deb", e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}
