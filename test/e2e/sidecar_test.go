// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/pillionproxy/pillion/test/testnet"
	"golang.org/x/sys/unix"
)

// placement says where the proxy runs.
type placement string

const (
	inside  placement = "inside as uid 1666 with CAP_NET_RAW"
	outside placement = "outside as root"
)

var placements = []placement{inside, outside}

// sidecar is a running proxy.
type sidecar struct {
	*testnet.Cmd

	t   testing.TB
	ns  *testnet.Namespace
	log *testnet.Lines
}

// record is a line of the access log.
type record struct {
	Direction   string         `json:"direction"`
	Source      netip.AddrPort `json:"source"`
	Destination netip.AddrPort `json:"destination"`
	Upstream    netip.AddrPort `json:"upstream_source"`
	Sent        int64          `json:"bytes_sent"`
	Received    int64          `json:"bytes_received"`
	Reason      string         `json:"reason"`
	Error       string         `json:"error"`
}

// proxyCmd prepares a proxy that is not started yet.
func (p *pod) proxyCmd(where placement, args ...string) *sidecar {
	cg, user := p.proxyCG, &testnet.User{UID: 1666, GID: 1666, Caps: []uintptr{unix.CAP_NET_RAW}, NoNewPrivs: true}
	if where == outside {
		cg, user = nil, nil
	}
	cmd := p.ns.Command(cg, carrierPath, append([]string{"proxy", "--log-format", "json"}, args...)...)
	cmd.User = user
	s := &sidecar{Cmd: cmd, t: p.t, ns: p.ns, log: &testnet.Lines{}}
	cmd.Stdout, cmd.Stderr = s.log, s.log
	return s
}

// startProxy starts a proxy and waits until it says that it is ready.
func (p *pod) startProxy(where placement, args ...string) *sidecar {
	p.t.Helper()
	s := p.proxyCmd(where, args...)
	if err := s.Start(); err != nil {
		p.t.Fatalf("proxy: %v", err)
	}
	p.t.Cleanup(func() {
		if p.t.Failed() {
			p.t.Logf("the proxy %d (%s) said:\n%s", s.Process.Pid, where, tail(s.log.String(), 4000))
		}
	})
	p.proxy = s
	s.waitReady()
	return s
}

// waitReady waits until the proxy says that it is ready, and fails the test with what it said when it ends before.
func (s *sidecar) waitReady() {
	s.t.Helper()
	last := ""
	defer func() {
		if s.t.Failed() {
			s.t.Logf("/healthz/ready said last: %s", last)
		}
	}()
	testnet.Wait(s.t, "the proxy is ready", func() bool {
		if !s.Running() {
			s.t.Fatalf("the proxy ended with %d:\n%s", s.ExitCode(), s.log.String())
		}
		code, body, err := s.get("/healthz/ready")
		last = fmt.Sprint(code, " ", body, " ", err)
		return err == nil && code == http.StatusOK
	})
}

// get asks the health port, over loopback in the pod.
func (s *sidecar) get(path string) (code int, body string, err error) {
	c, err := s.ns.Dial("tcp6", "[::1]:16020")
	if err != nil {
		return 0, "", err
	}
	defer c.Close()
	if _, err := fmt.Fprintf(c, "GET %s HTTP/1.0\r\n\r\n", path); err != nil {
		return 0, "", err
	}
	r, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return 0, "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return r.StatusCode, string(b), err
}

// status reads fields of /proc/PID/status of the proxy, their values separated by single spaces.
func (s *sidecar) status(keys ...string) map[string]string {
	s.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.Process.Pid))
	if err != nil {
		s.t.Fatal(err)
	}
	got := map[string]string{}
	for _, line := range strings.Split(string(b), "\n") {
		if key, value, ok := strings.Cut(line, ":"); ok && slices.Contains(keys, key) {
			got[key] = strings.Join(strings.Fields(value), " ")
		}
	}
	return got
}

// records lists what the proxy has logged of connections so far.
func (s *sidecar) records() []record {
	var all []record
	for _, line := range s.log.All() {
		var r record
		if json.Unmarshal([]byte(line), &r) == nil && r.Direction != "" {
			all = append(all, r)
		}
	}
	return all
}

// waitRecord waits for the record of a connection from source. Where many connections are made, a source port may come
// back: use waitRecordOf.
func (s *sidecar) waitRecord(t testing.TB, source netip.AddrPort) record {
	t.Helper()
	return s.waitRecordThat(t, fmt.Sprintf("the access log has a line for the connection from %s", source), func(r record) bool {
		return r.Source == unmap(source)
	})
}

// waitRecordOf waits for the record of the connection.
func (s *sidecar) waitRecordOf(t testing.TB, c *testnet.Conn) record {
	t.Helper()
	return s.waitRecordThat(t, fmt.Sprintf("the access log has a line for the connection from %s to %s", c.Own, c.Peer), func(r record) bool {
		return r.Source == unmap(c.Own) && r.Destination == unmap(c.Peer)
	})
}

func (s *sidecar) waitRecordThat(t testing.TB, what string, match func(record) bool) record {
	t.Helper()
	var found record
	defer func() {
		if t.Failed() && found == (record{}) {
			t.Logf("no such record among %+v", s.records())
		}
	}()
	testnet.Wait(t, what, func() bool {
		for _, r := range s.records() {
			if match(r) {
				found = r
				return true
			}
		}
		return false
	})
	return found
}

// has reports whether a connection from source was recorded.
func (s *sidecar) has(source netip.AddrPort) bool {
	return slices.ContainsFunc(s.records(), func(r record) bool { return r.Source == unmap(source) })
}

// hasConn reports whether the connection was recorded.
func (s *sidecar) hasConn(c *testnet.Conn) bool {
	return slices.ContainsFunc(s.records(), func(r record) bool {
		return r.Source == unmap(c.Own) && r.Destination == unmap(c.Peer)
	})
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

func addrPort(a net.Addr) netip.AddrPort { return a.(*net.TCPAddr).AddrPort() }

func tail(s string, n int) string {
	if len(s) > n {
		return "... " + s[len(s)-n:]
	}
	return s
}
