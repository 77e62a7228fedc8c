// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"os"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Netlink is the namespace's own handle, for what has no word of its own here.
func (ns *Namespace) Netlink() *netlink.Handle { return ns.nl }

// Index is the number of a device.
func (ns *Namespace) Index(device string) int {
	ns.t.Helper()
	return ns.link(device).Attrs().Index
}

// Down sets a device down. The kernel takes its routes and its global IPv6 addresses with it.
func (ns *Namespace) Down(device string) {
	ns.t.Helper()
	if err := ns.nl.LinkSetDown(ns.link(device)); err != nil {
		ns.t.Fatalf("testnet: set %s of %s down: %v", device, ns.Name, err)
	}
}

// NoAddr takes addresses from a device, each given with its prefix length.
func (ns *Namespace) NoAddr(device string, cidrs ...string) {
	ns.t.Helper()
	for _, cidr := range cidrs {
		addr, err := netlink.ParseAddr(cidr)
		if err == nil {
			err = ns.nl.AddrDel(ns.link(device), addr)
		}
		if err != nil {
			ns.t.Fatalf("testnet: remove address %s from %s of %s: %v", cidr, device, ns.Name, err)
		}
	}
}

// LinkLocal is the link-local IPv6 address of a device, with the device as its zone.
func (ns *Namespace) LinkLocal(device string) string {
	ns.t.Helper()
	addrs, err := ns.nl.AddrList(ns.link(device), netlink.FAMILY_V6)
	if err != nil {
		ns.t.Fatalf("testnet: addresses of %s of %s: %v", device, ns.Name, err)
	}
	for _, a := range addrs {
		if a.IP.IsLinkLocalUnicast() {
			return a.IP.String() + "%" + device
		}
	}
	ns.t.Fatalf("testnet: %s of %s has no link-local address", device, ns.Name)
	return ""
}

// TunLink joins two namespaces by tun devices, which have no link header. This process carries the packets between
// them until the test ends.
func TunLink(a *Namespace, nameA string, b *Namespace, nameB string) {
	a.t.Helper()
	fa, fb := a.tun(nameA), b.tun(nameB)
	var pumps sync.WaitGroup
	for _, way := range [][2]*os.File{{fa, fb}, {fb, fa}} {
		pumps.Go(func() {
			for packet := make([]byte, 64<<10); ; {
				n, err := way[0].Read(packet)
				if err != nil {
					return // closed
				}
				_, _ = way[1].Write(packet[:n]) // fails while the other end is down: a lost packet
			}
		})
	}
	a.t.Cleanup(func() {
		fa.Close()
		fb.Close()
		pumps.Wait()
	})
	a.Up(nameA)
	b.Up(nameB)
}

// tun makes a tun device that lives as long as the file.
func (ns *Namespace) tun(name string) *os.File {
	ns.t.Helper()
	var fd int
	var err error
	ns.Do(func() { fd, err = openTun(name) })
	if err != nil {
		ns.t.Fatalf("testnet: tun device %s of %s: %v", name, ns.Name, err)
	}
	return os.NewFile(uintptr(fd), name) // non-blocking, so that closing it ends a read
}

func openTun(name string) (int, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}
