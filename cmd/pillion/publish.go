// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/pillionproxy/pillion/proxy"
	"github.com/pillionproxy/pillion/proxy/listen"
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
	own   map[openPort][]func() // stops of what the command was seen to listen on
}

func newPublisher(server *proxy.Server, kept *kept, stderr io.Writer) *publisher {
	return &publisher{server: server, kept: kept, stderr: stderr, named: make(map[uint16]bool), own: make(map[openPort][]func())}
}

// open opens what the flags name.
func (p *publisher) open(list publications) (err error) {
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
		stop, err := p.server.Publish(l, p.kept.dialTo(netip.AddrPortFrom(netip.Addr{}, one.port)))
		if err != nil {
			return fmt.Errorf("--publish %s: %w", one, err)
		}
		p.stops = append(p.stops, stop)
		p.named[one.port] = true
	}
	return nil
}

// update is told on what the command listens now, for --publish-all. A port that this host does not have to give is told of once,
// and not tried again for as long as the command has it.
func (p *publisher) update(now []openPort) {
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
		var stop func()
		if err == nil {
			stop, err = p.server.Publish(l, p.kept.dialTo(netip.AddrPortFrom(family.to, port.Port)))
		}
		if err != nil {
			fmt.Fprintf(p.stderr, "pillion: the command's port %d is not at %s: %v\n", port.Port, addr, err)
			continue
		}
		stops = append(stops, stop)
		at = append(at, addr.String())
	}
	if len(at) > 0 {
		fmt.Fprintf(p.stderr, "pillion: the command's port %d is at %s\n", port.Port, strings.Join(at, " and "))
	}
	return stops
}

// close ends it all.
func (p *publisher) close() {
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
