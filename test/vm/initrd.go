// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/test/vm/initramfs"
	"github.com/pillionproxy/pillion/test/vm/kernel"
	"github.com/pillionproxy/pillion/test/vm/wire"
)

// hostPrograms are taken into the guest where the host has them. The others that a test may ask for are servers with
// folders of data; a test that finds none is skipped, and its skip is shown.
var hostPrograms = []string{
	"sh", "cat", "env", "sleep", "true", "false", "mount", "umount", "unshare", "nsenter", "setsid", "setpriv", "printf", "stty", "tty",
	"id", "ls", "mkdir", "rm", "echo", "kill", "head", "curl", "ip", "tc",
	"iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore",
	"iptables-nft", "iptables-nft-save", "iptables-nft-restore", "ip6tables-nft", "ip6tables-nft-save", "ip6tables-nft-restore",
	"iptables-legacy", "iptables-legacy-save", "iptables-legacy-restore", "ip6tables-legacy", "ip6tables-legacy-save", "ip6tables-legacy-restore",
}

// hostPlugins are folders of what those programs load by themselves.
var hostPlugins = []string{"/usr/lib/x86_64-linux-gnu/xtables"}

// nodeSkips are folders of packages that no program reads.
var nodeSkips = []string{
	"usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/i18n", "usr/share/info", "usr/share/lintian", "usr/share/bash-completion",
	"usr/lib/x86_64-linux-gnu/gconv", "var/cache", "var/lib/dpkg",
}

// accounts are users that every node has, and one that is nobody's.
const (
	passwd = "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\nuser:x:1000:1000::/tmp:/bin/sh\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
	groups = "root:x:0:\ndaemon:x:1:\nuser:x:1000:\nnogroup:x:65534:\n"
	hosts  = "127.0.0.1 localhost\n::1 localhost\n"
)

// bootModules are loaded before the first job, as a node has them once a pod runs. Others are loaded when the kernel or a
// program asks for them, as on a node.
var bootModules = []string{"veth", "sch_ingress", "cls_bpf", "nf_conntrack"}

// content is what a guest has beside its kernel's modules and its plan. It is the same for every kernel.
type content struct {
	guest, pillion string // pillion may be empty
	suites         []suite
	binary         string   // of the user; may be empty
	files          []string // as HERE=THERE
	node           string   // folder with the programs; empty: this host's
}

// The places of programs in the guest.
const (
	guestPillion = "/usr/local/bin/pillion"
	guestBinary  = "/usr/local/bin/program"
)

// writeCommon writes the archive that every machine begins with.
func (c content) writeCommon(file string, required []string) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	a := initramfs.New(f)
	for _, dir := range []string{"/proc", "/sys", "/dev", "/run", "/root", "/etc", "/var/log", "/usr/local/bin"} {
		a.Dir(dir, 0o755)
	}
	a.Dir("/tmp", 0o777|os.ModeSticky)
	a.Copy("/init", c.guest)
	a.Link("/usr/sbin/modprobe", "/init")
	a.Link("/etc/mtab", "/proc/self/mounts")
	a.File("/etc/passwd", 0o644, []byte(passwd))
	a.File("/etc/group", 0o644, []byte(groups))
	a.File("/etc/hosts", 0o644, []byte(hosts))
	if c.pillion != "" {
		a.Copy(guestPillion, c.pillion)
	}
	if c.binary != "" {
		a.Copy(guestBinary, c.binary)
	}
	for _, f := range c.files {
		here, there, _ := strings.Cut(f, "=")
		a.Copy(there, here)
	}
	for _, s := range c.suites {
		a.Copy(path.Join(s.guestDir(), "suite.test"), s.binary)
		a.Tree(path.Join(s.guestDir(), "testdata"), filepath.Join(s.dir, "testdata"))
	}
	var errs []error
	if c.node != "" {
		a.Tree("/", c.node, nodeSkips...)
	} else {
		errs = hostContent(a)
	}
	for _, name := range required {
		p, ok := initramfs.FindProgram(name)
		if !ok {
			errs = append(errs, &config.Fault{Err: fmt.Errorf("program %s: this host does not have it", name), Hint: "install it here, or leave it out of -programs"})
			continue
		}
		errs = append(errs, a.Program(p))
	}
	if err := errors.Join(append(errs, a.Close(), f.Close())...); err != nil {
		return fmt.Errorf("write the initramfs: %w", err)
	}
	return nil
}

// hostContent adds programs of this host.
func hostContent(a *initramfs.Archive) (errs []error) {
	for _, name := range hostPrograms {
		if p, ok := initramfs.FindProgram(name); ok {
			errs = append(errs, a.Program(p))
		}
	}
	for _, dir := range hostPlugins {
		errs = append(errs, a.Plugins(dir))
	}
	return errs
}

// writeInitrd writes the archive of one machine: the common one, then its modules and its plan.
func writeInitrd(file, common string, k kernel.Kernel, plan wire.Plan) error {
	in, err := os.Open(common)
	if err != nil {
		return err
	}
	defer in.Close()
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, in)
	a := initramfs.New(f)
	for _, m := range k.Modules {
		a.File(path.Join(wire.ModuleDir, m.Name+".ko"), 0o644, m.Content)
	}
	a.File(path.Join(wire.ModuleDir, wire.ModuleIndex), 0o644, []byte(kernel.NewIndex(k.Modules).String()))
	text, jsonErr := json.Marshal(plan)
	a.File(wire.PlanFile, 0o644, text)
	if err := errors.Join(err, jsonErr, a.Close(), f.Close()); err != nil {
		return fmt.Errorf("write the initramfs: %w", err)
	}
	return nil
}
