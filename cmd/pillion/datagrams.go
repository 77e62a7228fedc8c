// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"

	"github.com/pillionproxy/pillion/proxy/listen"
	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// listenUDP opens a socket to which the packet filter may give datagrams for any address; each tells for whom it was.
func listenUDP(ctx context.Context, at netip.AddrPort) (*os.File, error) {
	lc := net.ListenConfig{Control: transparentUDP(at.Addr().Is6())}
	conn, err := lc.ListenPacket(ctx, "udp", at.String())
	if err != nil {
		return nil, fmt.Errorf("listen for datagrams: %w", err)
	}
	defer conn.Close()
	return conn.(*net.UDPConn).File()
}

// open makes a socket in the name of whom the command asked.
func (a keepFlow) open(ctx context.Context) (*os.File, error) {
	d := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(a.Meant), Control: transparentUDP(a.Meant.Addr().Is6())}
	conn, err := d.DialContext(ctx, "udp", a.Client.String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return conn.(*net.UDPConn).File()
}

func transparentUDP(v6 bool) func(string, string, syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) {
			level, name, opt := unix.SOL_IP, "IP_RECVORIGDSTADDR", unix.IP_RECVORIGDSTADDR
			if v6 {
				level, name, opt = unix.SOL_IPV6, "IPV6_RECVORIGDSTADDR", unix.IPV6_RECVORIGDSTADDR
			}
			err = errors.Join(
				listen.SetTransparent(int(fd), v6),
				listen.SetOption(int(fd), name, level, opt, 1),
				listen.SetOption(int(fd), "SO_REUSEADDR", unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
			)
		})
		return errors.Join(cerr, err)
	}
}

// refuse sends the command the ICMP error that it would have got: of its datagram, the header is enough (RFC 792, RFC 4443 §3.1).
func (a keepFlow) refuse() error {
	ports := []byte{byte(a.Client.Port() >> 8), byte(a.Client.Port()), byte(a.Meant.Port() >> 8), byte(a.Meant.Port()), 0, 8, 0, 0} // RFC 768
	network, message := "ip4:icmp", icmp.Message{Type: ipv4.ICMPTypeDestinationUnreachable}
	noHost, noPort := 1, 3
	if a.Meant.Addr().Is6() {
		network, message.Type = "ip6:ipv6-icmp", ipv6.ICMPTypeDestinationUnreachable
		noHost, noPort = 3, 4
	}
	message.Code = noHost
	if a.NoPort {
		message.Code = noPort
	}
	quoted, err := a.header()
	if err != nil {
		return err
	}
	message.Body = &icmp.DstUnreach{Data: append(quoted, ports...)}
	b, err := message.Marshal(nil) // the kernel sums up ICMPv6
	if err != nil {
		return err
	}
	conn, err := net.Dial(network, a.Client.Addr().String())
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Write(b)
	return err
}

// header is that of a datagram of the command without content (RFC 791 §3.1, RFC 8200 §3).
func (a keepFlow) header() ([]byte, error) {
	if a.Meant.Addr().Is4() {
		h := ipv4.Header{
			Version: ipv4.Version, Len: ipv4.HeaderLen, TotalLen: ipv4.HeaderLen + 8, TTL: 64, Protocol: unix.IPPROTO_UDP,
			Src: a.Client.Addr().AsSlice(), Dst: a.Meant.Addr().AsSlice(),
		}
		return h.Marshal()
	}
	b := make([]byte, 8, ipv6.HeaderLen)
	b[0], b[5], b[6], b[7] = ipv6.Version<<4, 8, unix.IPPROTO_UDP, 64
	return append(append(b, a.Client.Addr().AsSlice()...), a.Meant.Addr().AsSlice()...), nil
}
