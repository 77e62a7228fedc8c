// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"time"

	"github.com/pillionproxy/pillion/redirect"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// outside is a network namespace of our own, joined to this one by a pair of interfaces: connections out of it come in here
// as from another host. It has documentation addresses (RFC 5737, RFC 3849), and nothing is reached through it.
type outside struct {
	namespace       *os.File
	inside, outside netip.Addr
}

// outsideLink is the end here.
const outsideLink = "pillion-probe"

var errNoOutside = errors.New("a network namespace may not be made")

func newOutside(f redirect.Family) (*outside, error) {
	o := &outside{inside: netip.MustParseAddr("198.51.100.1"), outside: netip.MustParseAddr("198.51.100.2")}
	bits := 30
	if f == redirect.IPv6 {
		o.inside, o.outside, bits = netip.MustParseAddr("2001:db8:0:1::1"), netip.MustParseAddr("2001:db8:0:1::2"), 126
	}
	if err := sweepOutside(); err != nil {
		return nil, err
	}
	var err error
	if o.namespace, err = newNamespace(); err != nil {
		if errors.Is(err, unix.EPERM) {
			return nil, errNoOutside
		}
		return nil, fmt.Errorf("make a network namespace to connect from: %w", err)
	}
	if err := o.join(bits); err != nil {
		o.Close()
		return nil, fmt.Errorf("join a network namespace to connect from: %w", err)
	}
	return o, nil
}

// newNamespace makes a network namespace that lives as long as the file is open. The thread that made it ends with it.
func newNamespace() (*os.File, error) {
	type made struct {
		file *os.File
		err  error
	}
	done := make(chan made)
	go func() {
		runtime.LockOSThread() // and never unlocked
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- made{nil, err}
			return
		}
		f, err := os.Open("/proc/thread-self/ns/net")
		done <- made{f, err}
	}()
	m := <-done
	return m.file, m.err
}

// join makes the pair of interfaces and gives both ends an address.
func (o *outside) join(bits int) error {
	pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: outsideLink}, PeerName: outsideLink + "1", PeerNamespace: netlink.NsFd(o.namespace.Fd())}
	if err := netlink.LinkAdd(pair); err != nil {
		return fmt.Errorf("add %s: %w", outsideLink, err)
	}
	here, err := netlink.LinkByName(outsideLink)
	if err != nil {
		return err
	}
	if err := address(netlink.AddrReplace, here, o.inside, bits); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(here); err != nil {
		return err
	}
	err = in(o.namespace, func() error {
		l, err := netlink.LinkByName(outsideLink + "1")
		if err != nil {
			return err
		}
		if err := address(netlink.AddrReplace, l, o.outside, bits); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return err
		}
		return carries(l)
	})
	return errors.Join(err, carries(here))
}

// carries waits until an interface sends what it is given: the kernel sets its queue up in a work of its own, and drops
// until then (net/core/link_watch.c). A probe would be sent again after a second; so this is no error.
func carries(l netlink.Link) error {
	for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		now, err := netlink.LinkByIndex(l.Attrs().Index)
		if err != nil || now.Attrs().OperState == netlink.OperUp {
			return err
		}
	}
	return nil
}

func address(set func(netlink.Link, *netlink.Addr) error, l netlink.Link, a netip.Addr, bits int) error {
	return set(l, &netlink.Addr{
		IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, a.BitLen())},
		Flags: unix.IFA_F_NODAD,
	})
}

// in calls a function on a thread in another network namespace, which ends with it.
func in(namespace *os.File, do func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked
		if err := unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- do()
	}()
	return <-done
}

// Close removes the pair and, with its last user, the namespace.
func (o *outside) Close() error { return errors.Join(sweepOutside(), o.namespace.Close()) }

// sweepOutside removes the pair. That of a process that was killed goes by itself, but some time later.
func sweepOutside() error {
	l, err := netlink.LinkByName(outsideLink)
	if err != nil {
		return nil
	}
	if err := netlink.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("delete %s: %w", outsideLink, err)
	}
	return nil
}
