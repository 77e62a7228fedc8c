// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Namespace is a network namespace, bind-mounted to /run/netns under its Name, so that `ip netns exec` and
// `pillion --netns` find it.
type Namespace struct {
	Name string

	t    testing.TB
	file *os.File // of type nsfs
	fd   int      // of file; read by goroutines that a test left hanging, so never written again
	nl   *netlink.Handle
}

// Namespace makes a network namespace with lo up, whose IPv6 addresses need no duplicate address detection.
func (n *Net) Namespace(label string) *Namespace {
	n.t.Helper()
	ns := &Namespace{Name: n.name(label), t: n.t}
	var err error
	onThread(func() { ns.file, err = newNamespace(ns.Path()) })
	if err != nil {
		n.t.Fatalf("testnet: namespace %s: %v", ns.Name, err)
	}
	ns.fd = int(ns.file.Fd())
	n.t.Cleanup(func() {
		if ns.nl != nil {
			ns.nl.Close()
		}
		if err := errors.Join(ns.file.Close(), unmountNamespace(ns.Path())); err != nil {
			n.t.Errorf("testnet: namespace %s: %v", ns.Name, err)
		}
	})
	// netlink.NewHandleAt enters the namespace itself; its own socket stays there. Other families than ROUTE may not be in
	// the kernel.
	if ns.nl, err = netlink.NewHandleAt(netns.NsHandle(ns.fd), unix.NETLINK_ROUTE); err != nil {
		n.t.Fatalf("testnet: netlink of namespace %s: %v", ns.Name, err)
	}
	for _, which := range []string{"all", "default"} {
		ns.Sysctl("net.ipv6.conf."+which+".accept_dad", "0")
		ns.Sysctl("net.ipv6.conf."+which+".dad_transmits", "0")
	}
	ns.Up("lo")
	return ns
}

// Path is the file that stands for the namespace.
func (ns *Namespace) Path() string { return filepath.Join(netnsDir, ns.Name) }

// newNamespace makes a namespace of the calling thread and mounts it to path.
func newNamespace(path string) (*os.File, error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, fmt.Errorf("unshare: %w", err)
	}
	if err := os.WriteFile(path, nil, 0o444); err != nil {
		return nil, err
	}
	if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
		os.Remove(path)
		return nil, fmt.Errorf("mount %s: %w", path, err)
	}
	return os.Open(path)
}

func unmountNamespace(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return os.Remove(path)
}

// onThread runs f on a thread that ends with it: whatever f does to its thread (namespaces, capabilities) ends too.
func onThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the runtime then ends the thread
		f()
	}()
	<-done
}

// Do runs f in the calling goroutine, with its thread inside the namespace. Sockets made in it stay there for good;
// goroutines started in it are not in the namespace. Do may be nested, and f may end the test.
func (ns *Namespace) Do(f func()) {
	runtime.LockOSThread()
	before, err := os.Open("/proc/thread-self/ns/net")
	if err == nil {
		err = unix.Setns(ns.fd, unix.CLONE_NEWNET)
	}
	if err != nil {
		runtime.UnlockOSThread()
		panic(fmt.Sprintf("testnet: enter namespace %s: %v", ns.Name, err))
	}
	defer func() {
		defer before.Close()
		if err := unix.Setns(int(before.Fd()), unix.CLONE_NEWNET); err != nil {
			panic(fmt.Sprintf("testnet: leave namespace %s: %v", ns.Name, err)) // the thread stays locked and ends
		}
		runtime.UnlockOSThread()
	}()
	f()
}

// Sysctl sets a sysctl of the namespace, written with dots.
func (ns *Namespace) Sysctl(key, value string) {
	ns.t.Helper()
	var err error
	ns.Do(func() { err = os.WriteFile(sysctlPath(key), []byte(value), 0) })
	if err != nil {
		ns.t.Fatalf("testnet: sysctl %s of %s: %v", key, ns.Name, err)
	}
}

// SysctlValue reads a sysctl of the namespace; "absent" where the kernel does not have it.
func (ns *Namespace) SysctlValue(key string) string {
	ns.t.Helper()
	var b []byte
	var err error
	ns.Do(func() { b, err = os.ReadFile(sysctlPath(key)) })
	if errors.Is(err, os.ErrNotExist) {
		return "absent"
	}
	if err != nil {
		ns.t.Fatalf("testnet: sysctl %s of %s: %v", key, ns.Name, err)
	}
	return strings.TrimSpace(string(b))
}

func sysctlPath(key string) string { return "/proc/sys/" + strings.ReplaceAll(key, ".", "/") }

// Link joins two namespaces by a veth pair, both ends up.
func Link(a *Namespace, nameA string, b *Namespace, nameB string) {
	a.t.Helper()
	err := a.nl.LinkAdd(&netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: nameA, TxQLen: 1000},
		PeerName:      nameB,
		PeerNamespace: netlink.NsFd(b.file.Fd()),
	})
	if err != nil {
		a.t.Fatalf("testnet: join %s and %s: %v", a.Name, b.Name, err)
	}
	a.Up(nameA)
	b.Up(nameB)
	a.settle(nameA)
	b.settle(nameB)
}

// settle waits until the kernel has done what it does on its own after a device came up or got an address: notice the
// carrier, give the device a link-local address, and route each IPv6 address of it to this host.
func (ns *Namespace) settle(device string) {
	ns.t.Helper()
	link := ns.link(device)
	last := ""
	ok := wait(func() bool {
		addrs, err := ns.nl.AddrList(link, netlink.FAMILY_V6)
		if err != nil {
			last = err.Error()
			return false
		}
		routes, err := ns.nl.RouteListFiltered(netlink.FAMILY_V6,
			&netlink.Route{Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
		if err != nil {
			last = err.Error()
			return false
		}
		last = fmt.Sprintf("addresses %v, local routes %v", addrs, routes)
		linkLocal := link.Attrs().Flags&net.FlagLoopback != 0
		for _, a := range addrs {
			routed := slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.Dst != nil && r.Dst.IP.Equal(a.IP) })
			if a.Flags&unix.IFA_F_TENTATIVE != 0 || !routed {
				return false
			}
			linkLocal = linkLocal || a.IP.IsLinkLocalUnicast()
		}
		return linkLocal
	})
	if !ok {
		ns.t.Fatalf("testnet: device %s of %s does not settle: %s", device, ns.Name, last)
	}
}

func (ns *Namespace) link(name string) netlink.Link {
	ns.t.Helper()
	link, err := ns.nl.LinkByName(name)
	if err != nil {
		ns.t.Fatalf("testnet: device %s of %s: %v", name, ns.Name, err)
	}
	return link
}

// Up sets a device up.
func (ns *Namespace) Up(device string) {
	ns.t.Helper()
	if err := ns.nl.LinkSetUp(ns.link(device)); err != nil {
		ns.t.Fatalf("testnet: set %s of %s up: %v", device, ns.Name, err)
	}
}

// Addr gives a device addresses of either family, each with its prefix length. They can be used when it returns.
func (ns *Namespace) Addr(device string, cidrs ...string) {
	ns.t.Helper()
	defer ns.settle(device)
	for _, cidr := range cidrs {
		addr, err := netlink.ParseAddr(cidr)
		if err == nil {
			if addr.IP.To4() == nil {
				addr.Flags = unix.IFA_F_NODAD
			}
			err = ns.nl.AddrAdd(ns.link(device), addr)
		}
		if err != nil {
			ns.t.Fatalf("testnet: address %s on %s of %s: %v", cidr, device, ns.Name, err)
		}
	}
}

// DefaultRoute routes everything else by the given gateways, one for each family.
func (ns *Namespace) DefaultRoute(gateways ...string) {
	ns.t.Helper()
	for _, gw := range gateways {
		if err := ns.nl.RouteAdd(&netlink.Route{Gw: parseIP(ns.t, gw)}); err != nil {
			ns.t.Fatalf("testnet: default route by %s in %s: %v", gw, ns.Name, err)
		}
	}
}

// Blackhole makes the namespace drop what it is asked to forward to the given prefixes, without a word. Without it kernels
// differ: some tell the sender that there is no route, though they forward nothing.
func (ns *Namespace) Blackhole(cidrs ...string) {
	ns.t.Helper()
	for _, cidr := range cidrs {
		dst, err := netlink.ParseIPNet(cidr)
		if err == nil {
			err = ns.nl.RouteAdd(&netlink.Route{Dst: dst, Type: unix.RTN_BLACKHOLE})
		}
		if err != nil {
			ns.t.Fatalf("testnet: black hole %s in %s: %v", cidr, ns.Name, err)
		}
	}
}

// DeprecatedAddr gives a device IPv6 addresses that the kernel does not choose by itself as the source of a connection.
func (ns *Namespace) DeprecatedAddr(device string, cidrs ...string) {
	ns.t.Helper()
	defer ns.settle(device)
	for _, cidr := range cidrs {
		addr, err := netlink.ParseAddr(cidr)
		if err == nil {
			addr.Flags, addr.ValidLft, addr.PreferedLft = unix.IFA_F_NODAD, 1<<31-1, 0
			err = ns.nl.AddrAdd(ns.link(device), addr)
		}
		if err != nil {
			ns.t.Fatalf("testnet: address %s on %s of %s: %v", cidr, device, ns.Name, err)
		}
	}
}
