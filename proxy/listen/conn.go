// SPDX-License-Identifier: Apache-2.0

package listen

import (
	"net"
	"net/netip"

	"github.com/pillionproxy/pillion/proxy/loop"
	"golang.org/x/sys/unix"
)

// Conn is an accepted connection. Its addresses and Redirected may be asked for from anywhere; all else belongs to its loop.
type Conn struct {
	*loop.Conn
	local, remote netip.AddrPort // local: its destination
	redirected    bool           // local is not the socket's own address
	v6            bool
}

// accepted finds out about a connection that was accepted at the port.
func accepted(conn *loop.Conn, from netip.AddrPort, port uint16) *Conn {
	c := &Conn{Conn: conn, local: conn.Local(), remote: from}
	c.v6 = c.local.Addr().Is6()
	c.findDestination(port)
	return c
}

func addrPort(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// Local is the address that the client meant.
func (c *Conn) Local() netip.AddrPort { return c.local }

// Redirected reports whether that is not the address of the socket: the capture has rewritten it.
func (c *Conn) Redirected() bool { return c.redirected }

// Remote is the connection's true client. Of a redirected one the port may be another: connection tracking changes it where the
// client has two connections that would look alike to us.
func (c *Conn) Remote() netip.AddrPort { return c.remote }

// Mark is the packet mark of the socket: the mark with which its SYN was given to us.
func (c *Conn) Mark() (mark uint32) {
	_ = c.Control(func(fd int) error { // an error means closed; whoever uses the connection next will meet it
		v, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK)
		if err == nil {
			mark = uint32(v)
		}
		return err
	})
	return mark
}

// Device is the index of the device to which the client's socket is bound, 0 if to none. An unbound socket's SYN comes in
// by lo (index 1 in every network namespace); that of a bound one, by that device. Towards an address of this host
// nothing can be told: the kernel names the device that has the address, and the dial must not be bound to it. A redirected
// connection is never that of a bound socket, whose SYN could not get to lo.
func (c *Conn) Device() (index int) {
	if c.redirected {
		return 0
	}
	_ = c.Control(func(fd int) error {
		index = arrivalDevice(fd, c.v6)
		return nil
	})
	if index <= 1 || IsOwn(c.local.Addr()) {
		return 0
	}
	return index
}
