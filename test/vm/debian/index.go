// SPDX-License-Identifier: Apache-2.0

package debian

import (
	"bufio"
	"bytes"
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Release is one kernel that Debian has.
type Release struct {
	Series   string    `json:"series"` // 6.12
	Version  string    `json:"version"`
	Packages []Package `json:"packages"` // the kernel and its modules
}

// Package is one file of the archive.
type Package struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	SHA256  string `json:"sha256"`
	Size    int64  `json:"size"`
}

// file is its name in the cache.
func (p Package) file() string {
	return fmt.Sprintf("%s_%s.deb", p.Name, strings.ReplaceAll(p.Version, ":", "%3a"))
}

// kernelName tells kernels of the cloud flavour, which has what a virtual machine needs and half the size.
var kernelName = regexp.MustCompile(`^linux-(image|binary)-(\d+\.\d+)[.0-9]*[-+~.a-z0-9]*-cloud-amd64$`)

// parsePackages reads the paragraphs that `apt-cache show` prints.
func parsePackages(show []byte) (packages []Package) {
	var p Package
	for s := bufio.NewScanner(bytes.NewReader(show)); ; {
		more := s.Scan()
		if line := s.Text(); more && line != "" {
			switch key, value, _ := strings.Cut(line, ": "); key {
			case "Package":
				p.Name = value
			case "Version":
				p.Version = value
			case "SHA256":
				p.SHA256 = value
			case "Size":
				p.Size, _ = strconv.ParseInt(value, 10, 64)
			}
			continue
		}
		if p.Name != "" && p.SHA256 != "" {
			packages = append(packages, p)
		}
		if p = (Package{}); !more {
			return packages
		}
	}
}

// smallestKernel: since 6.19 the package linux-image has no file of the kernel's own, and a few kilobytes.
const smallestKernel = 1 << 20

// newest finds the newest kernel of each series, lowest first. Where the modules are a package of their own it is added.
func newest(packages []Package) []Release {
	byName := map[string]Package{}
	for _, p := range packages {
		if old, known := byName[p.Name]; !known || compareVersions(p.Version, old.Version) > 0 {
			byName[p.Name] = p
		}
	}
	best := map[string]Release{}
	for _, p := range byName {
		m := kernelName.FindStringSubmatch(p.Name)
		if m == nil || p.Size < smallestKernel || strings.Contains(p.Name, "-unsigned") {
			continue
		}
		r := Release{Series: m[2], Version: p.Version, Packages: []Package{p}}
		if m[1] == "binary" {
			modules, known := byName[strings.Replace(p.Name, "linux-binary-", "linux-modules-", 1)]
			if !known {
				continue
			}
			r.Packages = append(r.Packages, modules)
		}
		if old, known := best[r.Series]; !known || compareVersions(r.Version, old.Version) > 0 {
			best[r.Series] = r
		}
	}
	var releases []Release
	for _, r := range best {
		releases = append(releases, r)
	}
	slices.SortFunc(releases, func(a, b Release) int { return CompareSeries(a.Series, b.Series) })
	return releases
}

// CompareSeries compares two series, such as 5.10 and 6.1.
func CompareSeries(a, b string) int { return compareVersions(a, b) }

// compareVersions compares two versions as deb-version(7) says, which for kernels have no epoch.
func compareVersions(a, b string) int {
	for a != "" || b != "" {
		var wordA, wordB, numberA, numberB string
		wordA, a = cutWord(a)
		wordB, b = cutWord(b)
		if c := compareWords(wordA, wordB); c != 0 {
			return c
		}
		numberA, a = cutNumber(a)
		numberB, b = cutNumber(b)
		if c := cmp.Or(cmp.Compare(len(numberA), len(numberB)), cmp.Compare(numberA, numberB)); c != 0 {
			return c
		}
	}
	return 0
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

func cutWord(s string) (word, rest string) {
	i := 0
	for i < len(s) && !isDigit(s[i]) {
		i++
	}
	return s[:i], s[i:]
}

// cutNumber returns the digits without leading zeros, so that the longer one is the greater.
func cutNumber(s string) (number, rest string) {
	i := 0
	for i < len(s) && isDigit(s[i]) {
		i++
	}
	return strings.TrimLeft(s[:i], "0"), s[i:]
}

// compareWords: ~ sorts before everything, even before the end; letters sort before the rest.
func compareWords(a, b string) int {
	weight := func(s string, i int) int {
		switch {
		case i >= len(s):
			return 0
		case s[i] == '~':
			return -1
		case 'a' <= s[i]|0x20 && s[i]|0x20 <= 'z':
			return int(s[i])
		}
		return int(s[i]) + 256
	}
	for i := range max(len(a), len(b)) {
		if c := cmp.Compare(weight(a, i), weight(b, i)); c != 0 {
			return c
		}
	}
	return 0
}
