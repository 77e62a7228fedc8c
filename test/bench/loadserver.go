// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"net/netip"

	"github.com/pillionproxy/pillion/config"
	"golang.org/x/sys/unix"
)

// A request of the load is so long. It says how many bytes the answer shall have, and whether the server shall close behind
// it. Every byte of the answer is byApp or bySidecar.
const requestSize = 100

type request [requestSize]byte

func newRequest(answer int, closes bool) (r request) {
	binary.BigEndian.PutUint32(r[:], uint32(answer))
	if closes {
		r[4] = 1
	}
	return r
}

func (r *request) answer() int  { return int(binary.BigEndian.Uint32(r[:])) }
func (r *request) closes() bool { return r[4] != 0 }

// loadServer answers requests.
type loadServer struct {
	poller   *poller
	listener int
	apps     netip.Prefix // from where the app dials
	conns    byDescriptor[answering]
	answers  map[byte][]byte
}

// answering is a connection of the server.
type answering struct {
	fd      int
	chunk   []byte // what an answer is made of
	request request
	got     int // bytes of the request
	rest    int // bytes of the answer
	blocked bool
}

func loadServerRole(args []string, ready io.Writer) error {
	flags := flag.NewFlagSet("bench load-server", flag.ContinueOnError)
	listen, apps := netip.AddrPort{}, netip.Prefix{}
	flags.TextVar(&listen, "listen", netip.AddrPortFrom(netip.IPv4Unspecified(), loadPort), "IPv4 address and port to listen on")
	flags.TextVar(&apps, "apps", appNetwork, "from where the app dials; others are sidecars, and so are the ports of Pillion's own range")
	if err := flags.Parse(args); err != nil {
		return err
	}
	s, err := newLoadServer(listen, apps)
	if err != nil {
		return err
	}
	fmt.Fprintln(ready, "ready")
	return s.serve()
}

func newLoadServer(listen netip.AddrPort, apps netip.Prefix) (*loadServer, error) {
	s := &loadServer{apps: apps, answers: map[byte][]byte{}}
	for _, by := range []byte{byApp, bySidecar} {
		s.answers[by] = bytes.Repeat([]byte{by}, 1<<20)
	}
	var err error
	if s.poller, err = newPoller(); err != nil {
		return nil, err
	}
	if s.listener, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, err
	}
	for _, o := range []struct{ level, option int }{{unix.SOL_SOCKET, unix.SO_REUSEADDR}, {unix.IPPROTO_TCP, unix.TCP_NODELAY}} {
		if err := unix.SetsockoptInt(s.listener, o.level, o.option, 1); err != nil {
			return nil, err
		}
	}
	if err := unix.Bind(s.listener, &unix.SockaddrInet4{Port: int(listen.Port()), Addr: listen.Addr().As4()}); err != nil {
		return nil, fmt.Errorf("bind to %s: %w", listen, err)
	}
	if err := unix.Listen(s.listener, 4096); err != nil {
		return nil, err
	}
	return s, s.poller.add(s.listener, unix.EPOLLIN)
}

// serve ends with an error or never. What happens to one connection is no error: the client notices.
func (s *loadServer) serve() error {
	for {
		events, err := s.poller.wait(-1)
		if err != nil {
			return err
		}
		for _, e := range events {
			if fd := int(e.Fd); fd == s.listener {
				err = s.accept()
			} else if c := s.conns[fd]; !s.step(c) {
				s.conns[fd] = nil
				err = unix.Close(fd)
			}
			if err != nil {
				return err
			}
		}
	}
}

func (s *loadServer) accept() error {
	for {
		fd, peer, err := unix.Accept4(s.listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		switch err {
		case nil:
		case unix.EAGAIN:
			return nil
		case unix.ECONNABORTED:
			continue
		default:
			return fmt.Errorf("accept: %w", err)
		}
		from, by := peer.(*unix.SockaddrInet4), byte(byApp)
		if !s.apps.Contains(netip.AddrFrom4(from.Addr)) || config.DialOutbound.Contains(uint16(from.Port)) {
			by = bySidecar
		}
		s.conns.set(fd, &answering{fd: fd, chunk: s.answers[by]})
		if err := s.poller.add(fd, unix.EPOLLIN); err != nil {
			return err
		}
	}
}

// step goes on with a connection as far as it can; false: it is over.
func (s *loadServer) step(c *answering) bool {
	if c.rest == 0 {
		n, err := unix.Read(c.fd, c.request[c.got:])
		if err != nil || n == 0 {
			return err == unix.EAGAIN
		}
		if c.got += n; c.got < requestSize {
			return true
		}
		c.got, c.rest = 0, c.request.answer()
	}
	for c.rest > 0 {
		n, err := unix.Write(c.fd, c.chunk[:min(c.rest, len(c.chunk))])
		if err == unix.EAGAIN {
			return s.waitFor(c, true)
		}
		if err != nil {
			return false
		}
		c.rest -= n
	}
	return !c.request.closes() && s.waitFor(c, false)
}

// waitFor waits for room instead of requests, or back.
func (s *loadServer) waitFor(c *answering, room bool) bool {
	if c.blocked == room {
		return true
	}
	c.blocked = room
	if room {
		return s.poller.change(c.fd, unix.EPOLLOUT) == nil
	}
	return s.poller.change(c.fd, unix.EPOLLIN) == nil
}
