// SPDX-License-Identifier: Apache-2.0

package tree

import (
	"bufio"
	"bytes"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"gotest.tools/v3/golden"
)

const module = "github.com/pillionproxy/pillion"

// tree is the root of the repository; go test runs in the folder of the package.
const tree = "../.."

// folders are the only ones at the root, each with its purpose in ARCHITECTURE.md.
var folders = []string{".ci", "bpf", "cmd", "config", "deploy", "init", "proxy", "redirect", "scripts", "test"}

// leftovers are folders at the root that are no part of the tree: see .gitignore.
var leftovers = []string{".git", "bin"}

// files calls f with every file of the tree, by its slash-separated path from the root.
func files(t *testing.T, f func(name string, content []byte)) {
	t.Helper()
	err := filepath.WalkDir(tree, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(tree, p)
		if err != nil {
			return err
		}
		name = filepath.ToSlash(name)
		switch {
		case d.IsDir() && slices.Contains(leftovers, name):
			return fs.SkipDir
		case !d.Type().IsRegular() || ignored(path.Base(name)):
			return nil
		}
		content, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		f(name, content)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// ignored names what .gitignore does, wherever it lies.
func ignored(base string) bool {
	for _, pattern := range []string{"coverage*", "*.test", "*.prof", "*.pprof"} {
		if ok, _ := path.Match(pattern, base); ok {
			return true
		}
	}
	return false
}

var generatedLine = regexp.MustCompile(`(?m)^// Code generated .* DO NOT EDIT\.$`)

func generated(content []byte) bool {
	head, _, _ := bytes.Cut(content, []byte("\npackage "))
	return generatedLine.Match(head)
}

func TestTopLevelFolders(t *testing.T) {
	entries, err := os.ReadDir(tree)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		if e.IsDir() && !slices.Contains(leftovers, e.Name()) {
			got = append(got, e.Name())
		}
	}
	if diff := cmp.Diff(folders, got); diff != "" {
		t.Errorf("folders at the root (-want +got):\n%s", diff)
	}
}

// arrows says which of our top-level folders the packages of each may import. Tests may import test/ besides.
var arrows = map[string][]string{
	"config":   {"config"},
	"bpf":      {"config"},
	"redirect": {"redirect", "bpf", "config"},
	"init":     {"init", "redirect", "bpf", "config"},
	"proxy":    {"proxy", "config"},
	"deploy":   {"deploy", "config"},
	"cmd":      {"cmd", "init", "redirect", "bpf", "proxy", "deploy", "config"},
	"test":     {"test", "cmd", "init", "redirect", "bpf", "proxy", "config"},
}

func TestArrowsPointOneWay(t *testing.T) {
	files(t, func(name string, content []byte) {
		if path.Ext(name) != ".go" {
			return
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, content, parser.ImportsOnly)
		if err != nil {
			t.Errorf("%v", err)
			return
		}
		from, _, _ := strings.Cut(name, "/")
		allowed, known := arrows[from]
		if !known {
			t.Errorf("%s: Go code in a folder that has no arrows here", name)
			return
		}
		if strings.HasSuffix(name, "_test.go") {
			// A test may stand outside its own package, and may use what test/ offers.
			allowed = append(slices.Clone(allowed), from, "test")
		}
		for _, spec := range file.Imports {
			imported, ours := strings.CutPrefix(strings.Trim(spec.Path.Value, `"`), module+"/")
			to, _, _ := strings.Cut(imported, "/")
			if ours && !slices.Contains(allowed, to) {
				t.Errorf("%s imports %s: %s may import only %v", name, imported, from, allowed)
			}
		}
	})
}

const (
	licence    = "SPDX-License-Identifier: Apache-2.0"
	licenceBPF = "SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)"
)

// firstLine is the line of the licence: the first that is neither a shebang nor a build constraint.
func firstLine(content []byte) string {
	for line := range strings.Lines(string(content)) {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "#!") && !strings.HasPrefix(line, "//go:build ") {
			return line
		}
	}
	return ""
}

func TestLicenceLines(t *testing.T) {
	files(t, func(name string, content []byte) {
		var want string
		switch ext := path.Ext(name); {
		case ext == ".go" && generated(content):
			return
		case ext == ".go":
			want = "// " + licence
		case ext == ".c":
			want = "// " + licenceBPF
		case ext == ".h":
			want = "/* " + licenceBPF + " */"
		case ext == ".sh", bytes.HasPrefix(content, []byte("#!")), ext == ".yml" && path.Dir(name) == ".",
			path.Base(name) == "Makefile", path.Base(name) == "Dockerfile":
			want = "# " + licence
		default:
			return
		}
		if path.Ext(name) == ".sh" && !bytes.HasPrefix(content, []byte("#!")) {
			t.Errorf("%s has no shebang", name)
		}
		if got := firstLine(content); got != want {
			t.Errorf("%s begins with %q, want %q", name, got, want)
		}
	})
	for _, text := range []string{"LICENSE", "bpf/LICENSE-BSD-2-Clause", "bpf/LICENSE-GPL-2.0"} {
		if _, err := os.Stat(filepath.Join(tree, text)); err != nil {
			t.Error(err)
		}
	}
}

func TestEveryPackageHasAComment(t *testing.T) {
	type pkg struct{ name, comment string }
	packages := map[string]pkg{}
	files(t, func(name string, content []byte) {
		if path.Ext(name) != ".go" || strings.HasSuffix(name, "_test.go") {
			return
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, content, parser.ParseComments|parser.PackageClauseOnly)
		if err != nil {
			t.Errorf("%v", err)
			return
		}
		dir := path.Dir(name)
		p := packages[dir]
		p.name = file.Name.Name
		if file.Doc != nil && !generated(content) {
			p.comment += file.Doc.Text()
		}
		packages[dir] = p
	})
	for dir, p := range packages {
		want := "Package " + p.name + " "
		if p.name == "main" {
			want = "Command "
		}
		if !strings.HasPrefix(p.comment, want) {
			t.Errorf("%s: the package comment begins with %.40q, want %q", dir, p.comment, want)
		}
	}
}

// TestNoPlaceOfOneMachine: a path that exists only where somebody works has no place in the tree.
func TestNoPlaceOfOneMachine(t *testing.T) {
	places := []string{`home/[a-z][^/ ]*`, `Users/[A-Za-z][^/ ]*`}
	checkout, err := filepath.Abs(tree)
	if err != nil {
		t.Fatal(err)
	}
	places = append(places, regexp.QuoteMeta(strings.TrimPrefix(checkout, "/")))
	if home, err := os.UserHomeDir(); err == nil && home != "/" {
		places = append(places, regexp.QuoteMeta(strings.TrimPrefix(home, "/")))
	}
	place := regexp.MustCompile(`(^|[^A-Za-z0-9_./$}-])/(` + strings.Join(places, "|") + `)/`)
	files(t, func(name string, content []byte) {
		if bytes.IndexByte(content, 0) >= 0 {
			return
		}
		for n, line := range strings.Split(string(content), "\n") {
			if m := place.FindString(line); m != "" {
				t.Errorf("%s:%d: %q is a path of one machine", name, n+1, m)
			}
		}
	})
}

func TestFileLengths(t *testing.T) {
	const most, rarely = 600, 500
	files(t, func(name string, content []byte) {
		if !slices.Contains([]string{".go", ".c", ".h", ".sh"}, path.Ext(name)) || generated(content) {
			return
		}
		switch lines := bytes.Count(content, []byte("\n")); {
		case lines > most:
			t.Errorf("%s has %d lines, at most %d: a file is about one thing", name, lines, most)
		case lines > rarely:
			t.Logf("%s has %d lines: is it about one thing?", name, lines)
		}
	})
}

// TestLinkedPackages: a new dependency of the binary is a visible decision.
func TestLinkedPackages(t *testing.T) {
	list := exec.Command("go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", "./cmd/pillion")
	list.Dir = tree
	list.Env = append(os.Environ(), "GOOS=linux", "GOARCH=amd64", "CGO_ENABLED=0", "GOWORK=off")
	var stderr strings.Builder
	list.Stderr = &stderr
	out, err := list.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	var got []string
	for line := range strings.Lines(string(out)) {
		if line = strings.TrimSpace(line); line != "" && line != module && !strings.HasPrefix(line, module+"/") {
			got = append(got, line)
		}
	}
	slices.Sort(got)
	golden.Assert(t, strings.Join(got, "\n")+"\n", "packages.txt")
}

// TestReadmeCommandsExist: what the README says to type, and the files that it points to, are there.
func TestReadmeCommandsExist(t *testing.T) {
	readme, err := os.ReadFile(filepath.Join(tree, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	targets := makeTargets(t)
	for _, m := range regexp.MustCompile("(?m)(?:^ *|`|sudo )make ([a-z-]+)").FindAllStringSubmatch(string(readme), -1) {
		if !slices.Contains(targets, m[1]) {
			t.Errorf("README.md says `make %s`, which is no target; there are %v", m[1], targets)
		}
	}
	for _, m := range regexp.MustCompile(`\]\(([^)#:]+)(?:#[^)]*)?\)`).FindAllStringSubmatch(string(readme), -1) {
		if _, err := os.Stat(filepath.Join(tree, m[1])); err != nil {
			t.Errorf("README.md links to %s: %v", m[1], err)
		}
	}
}

// TestMakeTargetsExplainThemselves: `make help` lists every target, and every script that one runs is there.
func TestMakeTargetsExplainThemselves(t *testing.T) {
	content, err := os.ReadFile(filepath.Join(tree, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	for _, target := range makeTargets(t) {
		if !regexp.MustCompile(`(?m)^` + target + `:.*## \S`).Match(content) {
			t.Errorf("the target %s has no ## help", target)
		}
	}
	for _, script := range regexp.MustCompile(`scripts/[a-z-]+\.sh`).FindAllString(string(content), -1) {
		info, err := os.Stat(filepath.Join(tree, script))
		if err != nil {
			t.Error(err)
		} else if info.Mode()&0o111 == 0 {
			t.Errorf("%s is not executable", script)
		}
	}
}

// makeTargets are those that .PHONY names.
func makeTargets(t *testing.T) []string {
	t.Helper()
	f, err := os.Open(filepath.Join(tree, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if names, ok := strings.CutPrefix(s.Text(), ".PHONY: "); ok {
			return strings.Fields(names)
		}
	}
	t.Fatal("the Makefile has no .PHONY line")
	return nil
}
