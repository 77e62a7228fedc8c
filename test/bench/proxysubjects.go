// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"text/template"

	"github.com/pillionproxy/pillion/config"
)

const loadPort = 8081

// appNetwork holds the addresses that the app dials from: a /16 for each host, of which each client gets a /24. A peer
// dials from the address of the host's device, so that no port of the app is one of its own; see perSource.
var appNetwork = netip.MustParsePrefix("10.64.0.0/10")

// proxied is the host of a subject.
type proxied struct {
	*host
	program []string // the proxy and its arguments; none: direct
	clients int      // that were started
}

// prepare makes the host of a subject: what redirects to the proxy, and how the proxy is started.
func (b proxiesBench) prepare(ctx context.Context, l *lab, subject string) (*proxied, error) {
	h, err := l.join(ctx, subject)
	if err != nil {
		return nil, err
	}
	p := &proxied{host: h}
	// A local route makes every address of it one to bind to.
	if err := ip(ctx, "-n", h.netns, "route", "add", "local", p.network().String(), "dev", "lo"); err != nil {
		return nil, err
	}
	err = ip(ctx, "-n", l.server.netns, "route", "add", p.network().String(), "via", h.address, "dev", h.peer)
	if err != nil {
		return nil, err
	}
	switch subject {
	case haproxy:
		if p.program, err = p.peer("haproxy", haproxyConfig, "-db", "-f"); err != nil {
			return nil, err
		}
		return p, h.redirect(ctx)
	case nginx:
		if p.program, err = p.peer("nginx", nginxConfig, "-e", "stderr", "-c"); err != nil {
			return nil, err
		}
		return p, h.redirect(ctx)
	case pillionRedirect, pillion:
		// Connections are logged at info.
		p.program = []string{l.pillion, "proxy", "--log-level", "warn", "--log-format", "json"}
		// Connections fail at once where by `hold` they would wait for a proxy that is not there yet, or has died.
		closed := []string{"--on-proxy-down", "closed"}
		if subject == pillion {
			return p, h.capture(ctx, closed...)
		}
		return p, h.install(ctx, nil, append(closed, "--backend", "redirect")...)
	}
	return p, nil
}

// network holds the addresses of the app.
func (p *proxied) network() netip.Prefix {
	base := appNetwork.Addr().As4()
	base[1] += byte(p.number)
	return netip.PrefixFrom(netip.AddrFrom4(base), 16)
}

// sources are the addresses of one client. They come round again after 256 clients: long after a minute, which is what
// TIME_WAIT lasts.
func (p *proxied) sources() netip.Prefix {
	base := p.network().Addr().As4()
	base[2] = byte(p.clients)
	p.clients++
	return netip.PrefixFrom(netip.AddrFrom4(base), 24)
}

// peer writes the configuration of a peer and returns how it is started.
func (p *proxied) peer(program string, configuration *template.Template, args ...string) ([]string, error) {
	path, err := exec.LookPath(program)
	if err != nil {
		return nil, missing(err)
	}
	limit, err := openFiles()
	if err != nil {
		return nil, err
	}
	var text bytes.Buffer
	connections := (int(limit) - 2*haproxyPipes - spareFiles) / 2
	if err := configuration.Execute(&text, map[string]any{
		"CPUs":        runtime.NumCPU(), // as Pillion has loops
		"Files":       limit,
		"Listen":      netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), config.PortOutbound),
		"Server":      p.target(),
		"Pipes":       haproxyPipes,
		"Connections": connections,
		"PerWorker":   2 * connections / runtime.NumCPU(),
	}); err != nil {
		return nil, err
	}
	file := filepath.Join(p.lab.dir, program+".conf")
	return append(append([]string{path}, args...), file), os.WriteFile(file, text.Bytes(), 0o644)
}

func (p *proxied) target() string { return fmt.Sprintf("%s:%d", p.server["IPv4"], loadPort) }

const (
	haproxyPipes = 256
	spareFiles   = 300
)

// haproxyConfig dials the original destination (0.0.0.0:0). Splicing whatever the size, and into pipes of 1 MiB, costs it
// a quarter of what splice-auto does in bulk.
var haproxyConfig = template.Must(template.New("haproxy").Parse(`global
	nbthread {{.CPUs}}
	maxconn {{.Connections}}
	maxpipes {{.Pipes}}
	tune.pipesize 1048576
defaults
	mode tcp
	timeout connect 10s
	timeout client 1h
	timeout server 1h
	option splice-request
	option splice-response
frontend f
	bind {{.Listen}}
	default_backend b
backend b
	server o 0.0.0.0:0
`))

// nginxConfig has a fixed upstream, nginx's best case: of itself it knows no original destination. The workers together
// allocate for as many connections as HAProxy does.
var nginxConfig = template.Must(template.New("nginx").Parse(`load_module modules/ngx_stream_module.so;
daemon off;
worker_processes {{.CPUs}};
worker_rlimit_nofile {{.Files}};
pid /dev/null;
events {
	worker_connections {{.PerWorker}};
}
stream {
	access_log off;
	proxy_connect_timeout 10s;
	proxy_timeout 1h;
	server {
		listen {{.Listen}} reuseport backlog=4096;
		proxy_pass {{.Server}};
	}
}
`))
