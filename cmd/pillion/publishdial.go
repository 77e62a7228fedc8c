// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/pillionproxy/pillion/proxy/listen"
	"github.com/pillionproxy/pillion/proxy/loop"
	"github.com/pillionproxy/pillion/proxy/upstream"
	"github.com/pillionproxy/pillion/redirect/rootless"
	"golang.org/x/sys/unix"
)

// dialTo dials a port of the command in the client's name; without an address, at the one that the client dialled.
func (k *kept) dialTo(to netip.AddrPort) func(context.Context, upstream.Client) (*net.TCPConn, error) {
	return func(ctx context.Context, c upstream.Client) (*net.TCPConn, error) {
		addr := to.Addr()
		if !addr.IsValid() {
			addr = c.Local().Addr()
		}
		f, err := k.askSocket(keepRequest{Dial: &keepDial{From: c.Remote(), To: netip.AddrPortFrom(addr, to.Port())}})
		if err != nil {
			return nil, err
		}
		defer f.Close()
		return connected(ctx, f)
	}
}

// publishTimeout is for a listener whose queue is full.
const publishTimeout = 10 * time.Second

// connected waits until a socket is that connects.
func connected(ctx context.Context, f *os.File) (*net.TCPConn, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	if err := f.SetDeadline(time.Now().Add(publishTimeout)); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	var refused error
	err = raw.Write(func(fd uintptr) bool {
		code, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && code != 0 {
			err = unix.Errno(code)
		}
		if err != nil {
			refused = os.NewSyscallError("connect", err)
			return true
		}
		_, err = unix.Getpeername(int(fd))
		return !errors.Is(err, unix.ENOTCONN)
	})
	if err := errors.Join(refused, err); err != nil {
		return nil, err
	}
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}

// keepDial is a connection to a listener of the command, in the name of its client.
type keepDial struct{ From, To netip.AddrPort }

// open begins to connect. By which port is the client's own affair: another one if that one is in use.
func (d keepDial) open() (*os.File, error) {
	for _, port := range []uint16{d.From.Port(), 0} {
		f, err := d.try(port)
		if err == nil || !errors.Is(err, unix.EADDRINUSE) && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return f, err
		}
	}
	return nil, os.NewSyscallError("bind", unix.EADDRINUSE)
}

func (d keepDial) try(port uint16) (*os.File, error) {
	family := unix.AF_INET
	if d.To.Addr().Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	f := os.NewFile(uintptr(fd), "connection")
	err = errors.Join(
		listen.SetTransparent(fd, d.To.Addr().Is6()),
		listen.SetOption(fd, "SO_MARK", unix.SOL_SOCKET, unix.SO_MARK, rootless.MarkProxy),
		loop.SetStream(fd),
		listen.SetKeepalive(fd),
	)
	if err == nil {
		err = os.NewSyscallError("bind", unix.Bind(fd, loop.Sockaddr(netip.AddrPortFrom(d.From.Addr(), port))))
	}
	if err == nil {
		err = unix.Connect(fd, loop.Sockaddr(d.To))
		if errors.Is(err, unix.EINPROGRESS) {
			err = nil
		}
		err = os.NewSyscallError("connect", err)
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}
