// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"github.com/pillionproxy/pillion/config"
	"golang.org/x/sys/unix"
)

func relayRole(args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("bench relay", flag.ContinueOnError)
	transparent := flags.Bool("transparent", false, "behind Pillion's capture; else behind REDIRECT")
	if err := flags.Parse(args); err != nil {
		return err
	}
	return relay(*transparent, stdout)
}

// relay is the least that a sidecar can be: it accepts, learns the original destination, dials it and copies both ways.
// It has no timeouts, limits, logs or metrics. Behind REDIRECT it asks conntrack for the destination; behind Pillion's
// capture the destination is the local address.
func relay(transparent bool, ready io.Writer) error {
	lc := plainTCP()
	if transparent {
		lc.Control = func(network, _ string, c syscall.RawConn) error {
			level, option := unix.SOL_IP, unix.IP_TRANSPARENT
			if network == "tcp6" {
				level, option = unix.SOL_IPV6, unix.IPV6_TRANSPARENT
			}
			return setOption(c, level, option, 1)
		}
	}
	errs := make(chan error)
	for network, address := range map[string]string{"tcp4": "127.0.0.1", "tcp6": "[::1]"} {
		l, err := lc.Listen(context.Background(), network, fmt.Sprintf("%s:%d", address, config.PortOutbound))
		if err != nil {
			return err
		}
		go func() { errs <- acceptAll(l, transparent) }()
	}
	fmt.Fprintln(ready, "ready")
	return <-errs
}

func acceptAll(l net.Listener, transparent bool) error {
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go carry(conn.(*net.TCPConn), transparent)
	}
}

func carry(app *net.TCPConn, transparent bool) {
	defer app.Close()
	destination := app.LocalAddr().(*net.TCPAddr).AddrPort()
	if !transparent {
		var err error
		if destination, err = originalDestination(app); err != nil {
			return
		}
	}
	if destination.Port() == config.PortOutbound {
		return // a connection to ourselves would go round for ever
	}
	server, err := dial(app.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(), destination)
	if err != nil {
		return
	}
	defer server.Close()
	var wg sync.WaitGroup
	wg.Go(func() { copyHalf(server, app) })
	copyHalf(app, server)
	wg.Wait()
}

func copyHalf(to, from *net.TCPConn) {
	_, _ = io.Copy(to, from)
	_ = to.CloseWrite()
}

var dialled atomic.Uint32

// dial dials from the app's address and a port of the sidecar's range. Behind REDIRECT that keeps the connections of app
// and relay apart in conntrack, where a port that both use lets a connection slip past the relay.
func dial(source netip.Addr, destination netip.AddrPort) (*net.TCPConn, error) {
	ports := config.DialOutbound
	for range ports.Len() {
		port := ports.First + uint16(int(dialled.Add(1))%ports.Len())
		d := net.Dialer{
			LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(source, port)),
			Control: func(_, _ string, c syscall.RawConn) error {
				return setOption(c, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
			},
		}
		conn, err := d.Dial("tcp", destination.String())
		if errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EADDRNOTAVAIL) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return conn.(*net.TCPConn), nil
	}
	return nil, unix.EADDRNOTAVAIL
}

func setOption(c syscall.RawConn, level, option, value int) error {
	var err error
	if cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, option, value) }); cerr != nil {
		return cerr
	}
	return err
}

// originalDestination asks conntrack (SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST, both 80, of linux/netfilter_ipv4.h and
// netfilter_ipv6/ip6_tables.h).
func originalDestination(conn *net.TCPConn) (netip.AddrPort, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	level := uintptr(unix.SOL_IPV6)
	if conn.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Is4() {
		level = unix.SOL_IP
	}
	var address unix.RawSockaddrInet6 // large enough for either
	size := uint32(unsafe.Sizeof(address))
	var errno unix.Errno
	err = raw.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall6(unix.SYS_GETSOCKOPT, fd, level, 80,
			uintptr(unsafe.Pointer(&address)), uintptr(unsafe.Pointer(&size)), 0)
	})
	if err != nil {
		return netip.AddrPort{}, err
	}
	if errno != 0 {
		return netip.AddrPort{}, errno
	}
	port := (*[2]byte)(unsafe.Pointer(&address.Port)) // big endian, in both
	ip := netip.AddrFrom16(address.Addr)
	if level == unix.SOL_IP {
		ip = netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(&address)).Addr)
	}
	return netip.AddrPortFrom(ip, uint16(port[0])<<8|uint16(port[1])), nil
}
