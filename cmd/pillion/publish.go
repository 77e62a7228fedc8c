// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pillionproxy/pillion/proxy"
	"github.com/pillionproxy/pillion/proxy/listen"
	"github.com/pillionproxy/pillion/proxy/upstream"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/rootless"
	"golang.org/x/sys/unix"
)

// publication is a port of the command, and where this host has it.
type publication struct {
	at   netip.AddrPort // without an address: at all of them
	port uint16
}

func (p publication) String() string {
	if !p.at.Addr().IsValid() {
		return fmt.Sprintf("%d:%d", p.at.Port(), p.port)
	}
	return fmt.Sprintf("%s:%d", p.at, p.port)
}

// publications is the flag --publish. It may be given again.
type publications []publication

func (p *publications) String() string {
	words := make([]string, len(*p))
	for i, one := range *p {
		words[i] = one.String()
	}
	return strings.Join(words, ",")
}

func (p *publications) Type() string { return "[addr:]port[:port]" }

// Set reads [ADDR:]PORT[:PORT]; an IPv6 address stands in brackets.
func (p *publications) Set(s string) error {
	for one := range strings.SplitSeq(s, ",") {
		parsed, err := parsePublication(one)
		if err != nil {
			return err
		}
		*p = append(*p, parsed)
	}
	return nil
}

func parsePublication(s string) (p publication, err error) {
	wrong := fmt.Errorf("%q is not [ADDR:]PORT[:PORT]: write 8080, 8080:80, 127.0.0.1:8080:80 or [::1]:8080", s)
	var addr netip.Addr
	rest := s
	if inner, after, ok := strings.Cut(s, "]:"); ok && strings.HasPrefix(inner, "[") {
		addr, err = netip.ParseAddr(inner[1:])
		rest = after
	} else if first, after, ok := strings.Cut(s, ":"); ok && strings.Contains(first, ".") {
		addr, err = netip.ParseAddr(first)
		rest = after
	}
	if err != nil {
		return p, wrong
	}
	var ports []uint16
	for word := range strings.SplitSeq(rest, ":") {
		n, err := strconv.ParseUint(word, 10, 16)
		if err != nil || n == 0 {
			return p, wrong
		}
		ports = append(ports, uint16(n))
	}
	if len(ports) > 2 {
		return p, wrong
	}
	return publication{netip.AddrPortFrom(addr, ports[0]), ports[len(ports)-1]}, nil
}

// publisher lets others connect to servers of the command.
type publisher struct {
	server *proxy.Server
	kept   *kept
	stderr io.Writer

	stops []func()              // of what the flags name
	named map[uint16]bool       // ports of the command that they name
	mu    sync.Mutex            // guards what follows
	over  bool                  // nothing more is opened
	own   map[openPort][]func() // stops of what the command was seen to listen on
}

// open opens what the flags name.
func (p *publisher) open(list publications) (err error) {
	p.named = make(map[uint16]bool)
	for _, one := range list {
		var l *listen.Listener
		if one.at.Addr().IsValid() {
			l, err = listen.OpenAt(one.at)
		} else {
			l, err = listen.Open(listen.Kind{Any: true}, one.at.Port(), nil)
		}
		if err != nil {
			return fmt.Errorf("--publish %s: %w", one, err)
		}
		p.stops = append(p.stops, p.server.Publish(l, p.kept.dialTo(netip.AddrPortFrom(netip.Addr{}, one.port))))
		p.named[one.port] = true
	}
	return nil
}

// update is told on what the command listens now, for --publish-all.
func (p *publisher) update(now []openPort) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.over {
		return
	}
	for port, stops := range p.own {
		if !slices.Contains(now, port) {
			delete(p.own, port)
			callAll(stops)
		}
	}
	for _, port := range now {
		if _, known := p.own[port]; !known && !p.named[port.Port] {
			p.own[port] = p.add(port)
		}
	}
}

// add publishes a port at the loopback addresses of this host, and says so.
func (p *publisher) add(port openPort) (stops []func()) {
	var at []string
	for _, family := range []struct {
		here string
		to   netip.Addr
	}{{"127.0.0.1", port.V4}, {"::1", port.V6}} {
		if !family.to.IsValid() {
			continue
		}
		addr := netip.AddrPortFrom(netip.MustParseAddr(family.here), port.Port)
		l, err := listen.OpenAt(addr)
		if err != nil {
			fmt.Fprintf(p.stderr, "pillion: the command's port %d is not at %s: %v\n", port.Port, addr, err)
			continue
		}
		stops = append(stops, p.server.Publish(l, p.kept.dialTo(netip.AddrPortFrom(family.to, port.Port))))
		at = append(at, addr.String())
	}
	if len(at) > 0 {
		fmt.Fprintf(p.stderr, "pillion: the command's port %d is at %s\n", port.Port, strings.Join(at, " and "))
	}
	return stops
}

// close ends it all.
func (p *publisher) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.over = true
	callAll(p.stops)
	for _, stops := range p.own {
		callAll(stops)
	}
}

func callAll(list []func()) {
	for _, f := range list {
		f()
	}
}

// openPort is a port on which the command listens, and where it is met there in each family; at the loopback address if it can be.
type openPort struct {
	Port   uint16
	V4, V6 netip.Addr
}

// openPorts are those of the sockets that listen, but for one of our own, in the order of their numbers. A socket of IPv6 that
// takes every address takes IPv4's, too, unless it was told not to, which cannot be seen.
func openPorts(sockets []redirect.Listening, ours uint16) []openPort {
	ports := make(map[uint16]openPort)
	prefer := func(old, found, loopback netip.Addr) netip.Addr {
		switch {
		case found.IsUnspecified():
			return loopback
		case old == loopback:
			return old
		}
		return found
	}
	for _, s := range sockets {
		if s.Local.Port() == ours {
			continue
		}
		p, addr := ports[s.Local.Port()], s.Local.Addr()
		p.Port = s.Local.Port()
		if addr.Unmap().Is4() || addr == netip.IPv6Unspecified() {
			p.V4 = prefer(p.V4, addr.Unmap(), netip.MustParseAddr("127.0.0.1"))
		}
		if addr.Is6() && !addr.Is4In6() {
			p.V6 = prefer(p.V6, addr, netip.IPv6Loopback())
		}
		ports[s.Local.Port()] = p
	}
	return slices.SortedFunc(maps.Values(ports), func(a, b openPort) int { return cmp.Compare(a.Port, b.Port) })
}

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
		listen.SetCommon(fd),
	)
	if err == nil {
		err = os.NewSyscallError("bind", unix.Bind(fd, sockaddr(netip.AddrPortFrom(d.From.Addr(), port))))
	}
	if err == nil {
		err = unix.Connect(fd, sockaddr(d.To))
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

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port())}
}
