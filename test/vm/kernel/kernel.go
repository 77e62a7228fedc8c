// SPDX-License-Identifier: Apache-2.0

// Package kernel takes a kernel and its modules out of Debian packages.
//
// What always holds: nothing is unpacked to disk; a package that is cut or otherwise damaged is an error; and what a
// module needs is read from the module itself, since the packages carry no index.
package kernel

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path"
	"strings"
)

// Kernel is what boots.
type Kernel struct {
	Image   []byte // bzImage
	Release string // as uname -r says it
	Modules []Module
}

// modulePaths are the folders below lib/modules/RELEASE/kernel that are taken: what a test of networking may need. The
// rest drives hardware that the machine does not have.
var modulePaths = []string{
	"net/", "crypto/", "lib/", "arch/x86/crypto/", "fs/overlayfs/", "fs/fuse/", "drivers/net/veth.", "drivers/net/dummy.",
	"drivers/net/tun.", "drivers/net/tap.", "drivers/net/ifb.", "drivers/net/macvlan.", "drivers/net/ipvlan/",
	"drivers/net/vxlan", "drivers/net/geneve.", "drivers/net/vrf.", "drivers/net/bonding/", "drivers/net/wireguard/",
	"drivers/net/macvtap.", "drivers/net/netkit.", "drivers/net/nlmon.", "drivers/net/vsockmon.",
}

// moduleSkips are folders in modulePaths of protocols that nobody captures, and that are large.
var moduleSkips = []string{
	"net/bluetooth/", "net/wireless/", "net/mac80211/", "net/ceph/", "net/sunrpc/", "net/9p/", "net/rds/", "net/tipc/",
	"net/smc/", "net/batman-adv/", "net/nfc/", "net/ieee802154/", "net/mac802154/", "net/rxrpc/", "net/dccp/", "net/openvswitch/",
	"net/can/", "net/ax25/", "net/appletalk/", "net/atm/", "net/x25/", "net/lapb/", "net/netrom/", "net/rose/", "net/6lowpan/",
	"net/dsa/", "net/hsr/", "net/phonet/", "net/rfkill/", "net/caif/", "net/wimax/", "net/decnet/", "net/sctp/",
}

// Read takes the kernel out of the packages that it comes in: one, or the image and its modules apart.
func Read(packages ...string) (Kernel, error) {
	var k Kernel
	for _, p := range packages {
		if err := k.read(p); err != nil {
			return Kernel{}, fmt.Errorf("read package %s: %w", p, err)
		}
	}
	if len(k.Image) == 0 || len(k.Modules) == 0 {
		return Kernel{}, fmt.Errorf("packages %v: no kernel (%d bytes) or no modules (%d) in them", packages, len(k.Image), len(k.Modules))
	}
	return k, nil
}

func (k *Kernel) read(deb string) error {
	cmd := exec.Command("dpkg-deb", "--fsys-tarfile", deb)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	err = k.readTar(pipe)
	if err != nil {
		_ = cmd.Process.Kill()
	} else {
		_, err = io.Copy(io.Discard, pipe) // what tar pads with
	}
	if waited := cmd.Wait(); waited != nil && err == nil {
		err = fmt.Errorf("dpkg-deb: %w: %s", waited, bytes.TrimSpace(stderr.Bytes()))
	}
	return err
}

func (k *Kernel) readTar(r io.Reader) error {
	for archive := tar.NewReader(r); ; {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(path.Clean("/"+h.Name), "/usr")
		inTree, isModule := strings.CutPrefix(name, "/lib/modules/")
		release, file, _ := strings.Cut(inTree, "/")
		switch {
		case h.Typeflag != tar.TypeReg:
		case strings.HasPrefix(name, "/boot/vmlinuz-"), isModule && file == "vmlinuz":
			if k.Image, err = io.ReadAll(archive); err != nil {
				return err
			}
		case isModule && wanted(strings.TrimPrefix(file, "kernel/")):
			k.Release = release
			content, err := io.ReadAll(archive)
			if err != nil {
				return err
			}
			m, err := readModule(name, content)
			if err != nil {
				return err
			}
			k.Modules = append(k.Modules, m)
		}
	}
}

// wanted reports whether a file below kernel/ is a module that is taken.
func wanted(file string) bool {
	if !strings.Contains(path.Base(file), ".ko") {
		return false
	}
	for _, p := range moduleSkips {
		if strings.HasPrefix(file, p) {
			return false
		}
	}
	for _, p := range modulePaths {
		if strings.HasPrefix(file, p) {
			return true
		}
	}
	return false
}
