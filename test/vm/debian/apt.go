// SPDX-License-Identifier: Apache-2.0

package debian

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/pillionproxy/pillion/config"
)

// Mirrors are where packages come from.
type Mirrors struct {
	Main, Security string // base addresses, as in a sources.list
}

// The variables that name a mirror, and what is used where the machine knows none of Debian itself.
const (
	MainVariable     = "PILLION_DEBIAN_MIRROR"
	SecurityVariable = "PILLION_DEBIAN_SECURITY_MIRROR"
	defaultMain      = "http://deb.debian.org/debian"
	defaultSecurity  = "http://deb.debian.org/debian-security"
)

// FindMirrors takes the mirrors from the environment, or else from what apt is set up with, or else Debian's own.
func FindMirrors(ctx context.Context, getenv func(string) string) Mirrors {
	m := Mirrors{Main: getenv(MainVariable), Security: getenv(SecurityVariable)}
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(ORIGIN)|$(CODENAME)|$(REPO_URI)").Output()
	if err == nil {
		m.addFrom(string(out))
	}
	if m.Main == "" {
		m.Main = defaultMain
	}
	if m.Security == "" {
		m.Security = defaultSecurity
	}
	return m
}

// addFrom adds what is missing, from lines of ORIGIN|CODENAME|URI.
func (m *Mirrors) addFrom(targets string) {
	for line := range strings.Lines(targets) {
		fields := strings.Split(strings.TrimSpace(line), "|")
		if len(fields) != 3 || fields[0] != "Debian" {
			continue
		}
		to := &m.Main
		if strings.HasSuffix(fields[1], "-security") {
			to = &m.Security
		}
		if *to == "" {
			*to = strings.TrimSuffix(fields[2], "/")
		}
	}
}

// keyring is what the lists of packages must be signed with.
const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// sources is the private list of sources. The suites are those whose newest kernels are wanted: each Debian release that
// still gets security updates, and the backports.
func (m Mirrors) sources() string {
	var b strings.Builder
	for _, suite := range []string{"bullseye-security", "bookworm-security", "trixie-security"} {
		fmt.Fprintf(&b, "deb [signed-by=%s] %s %s main\n", keyring, m.Security, suite)
	}
	fmt.Fprintf(&b, "deb [signed-by=%s] %s trixie-backports main\n", keyring, m.Main)
	return b.String()
}

// nodeSources is the list of sources for Unpack.
func (m Mirrors) nodeSources() string {
	return fmt.Sprintf("deb [signed-by=%s] %s %s main\ndeb [signed-by=%s] %s %s-security main\n", keyring, m.Main, nodeRelease, keyring, m.Security, nodeRelease)
}

// apt is a configuration of apt of our own: it reads how to reach the network from the machine's, and nothing else, and
// writes only below its folder.
type apt struct{ dir string }

// newAPT makes the folder.
func newAPT(dir, sources string) (apt, error) {
	if _, err := os.Stat(keyring); err != nil {
		return apt{}, &config.Fault{Err: err, Hint: "apt-get install debian-archive-keyring"}
	}
	for _, sub := range []string{"lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			return apt{}, err
		}
	}
	// Nothing is installed, by that list.
	if err := writeFile(filepath.Join(dir, "status"), nil); err != nil {
		return apt{}, err
	}
	return apt{dir}, writeFile(filepath.Join(dir, "sources.list"), []byte(sources))
}

// command prepares apt-get or apt-cache.
func (a apt) command(ctx context.Context, program string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, program)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
	for _, option := range []string{
		"Dir::Etc::sourcelist=" + filepath.Join(a.dir, "sources.list"), "Dir::Etc::sourceparts=/dev/null",
		"Dir::Etc::preferences=/dev/null", "Dir::Etc::preferencesparts=/dev/null",
		"Dir::State::lists=" + filepath.Join(a.dir, "lists"), "Dir::Cache=" + filepath.Join(a.dir, "cache"),
		"Dir::State::status=" + filepath.Join(a.dir, "status"), "Debug::NoLocking=true",
		"APT::Architecture=amd64", "APT::Architectures=amd64", "APT::Sandbox::User=root", "APT::Update::Post-Invoke-Success=",
		"Acquire::Languages=none", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false", "Acquire::Retries=1",
		"APT::Get::List-Cleanup=false", "APT::Update::Error-Mode=any",
	} {
		cmd.Args = append(cmd.Args, "-o", option)
	}
	cmd.Args = append(cmd.Args, args...)
	return cmd
}

// run runs a command and returns what it says. An error has its last words.
func (a apt) run(cmd *exec.Cmd) ([]byte, error) {
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Run(); err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			return nil, &config.Fault{Err: err, Hint: "packages come by Debian's apt: run this on Debian or a derivative"}
		}
		return nil, fmt.Errorf("%s: %w\n%s", filepath.Base(cmd.Path), err, tail(stderr.String()+out.String(), 6))
	}
	return out.Bytes(), nil
}

// tail is the end of a text that says something.
func tail(text string, lines int) string {
	var kept []string
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "E:") || strings.HasPrefix(line, "Err:") || strings.HasPrefix(line, "W:") {
			kept = append(kept, "  "+line)
		}
	}
	return strings.Join(kept[max(0, len(kept)-lines):], "\n")
}

// writeFile writes a file so that it is there whole or not at all.
func writeFile(path string, content []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails once it is renamed
	_, err = f.Write(content)
	if err = errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
