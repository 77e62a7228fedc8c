// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/test/testnet"
)

// ordinary is a user without any right.
var ordinary = &testnet.User{UID: 1000, GID: 1000}

// newRootless makes a session of an ordinary user whose app is what the user runs with `pillion run`.
func newRootless(t *testing.T, flags ...string) *session {
	t.Helper()
	s := newSession(t)
	s.user = ordinary
	s.app = s.inside(t, flags...)
	return s
}

// inside starts an agent by `pillion run`.
func (s *session) inside(t *testing.T, flags ...string) *testnet.Agent {
	t.Helper()
	a, _ := s.insideSaying(t, flags...)
	return a
}

// insideSaying is inside with what pillion says, which is also shown if the test fails.
func (s *session) insideSaying(t *testing.T, flags ...string) (*testnet.Agent, *testnet.Lines) {
	t.Helper()
	cmd, said := s.raw(append([]string{"--backend", "rootless"}, flags...), selfPath), &testnet.Lines{}
	cmd.Stderr = said
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("pillion run said:\n%s", said)
		}
	})
	a := s.ns.AgentThrough(cmd)
	if _, err := a.Socket(syscall.AF_INET); err != nil { // it is there
		t.Fatal(err)
	}
	return a, said
}

// askNeighboursOften makes it known soon that a neighbour is not there: three questions go unanswered before.
func (s *session) askNeighboursOften() {
	for _, family := range []string{"ipv4", "ipv6"} {
		s.ns.Sysctl("net."+family+".neigh.eth0.retrans_time_ms", "100")
	}
}

// TestRootlessAddresses: each end sees the truth, over every kind of socket, and at other addresses of the host.
func TestRootlessAddresses(t *testing.T) {
	t.Parallel()
	s := newRootless(t)
	for _, w := range s.outs() {
		for way, d := range map[string]testnet.Dial{"plain": {}, "non-blocking": {NonBlock: true}, "bound": {From: port0(w, pod4, pod6)}, "MPTCP": {MPTCP: true}} {
			t.Run(w.name+"/"+way, func(t *testing.T) {
				if d.MPTCP {
					testnet.Need(t, testnet.MPTCP)
				}
				saw := make(chan seen, 1)
				to := w.start(echo(saw))
				d.To, d.Mapped = to.String(), w.name == "out/mapped"
				if d.Mapped && d.From != "" {
					d.From = net.JoinHostPort("::ffff:"+pod4, "0")
				}
				c, err := s.app.Dial(d)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				if err := exchange(c, "hello"); err != nil {
					t.Fatal(err)
				}
				far := <-saw
				if unmap(c.Own).Addr() != w.from || unmap(c.Peer) != to {
					t.Errorf("the client sees %s to %s, want %s to %s", c.Own, c.Peer, w.from, to)
				}
				if far.peer.Addr() != w.from || !config.DialOutbound.Contains(far.peer.Port()) || far.own != to {
					t.Errorf("the server sees %s from %s, want %s from %s and a port of %s", far.own, far.peer, to, w.from, config.DialOutbound)
				}
			})
		}
	}
}

// TestRootlessCarriesAll that the other backends carry.
func TestRootlessCarriesAll(t *testing.T) {
	t.Parallel()
	s := newRootless(t)
	carriesAll(t, s.outs())
	for _, w := range s.outs()[:2] {
		t.Run(w.name+"/two thousand at once", func(t *testing.T) {
			const count = 2000
			to := w.start(func(c *net.TCPConn) { _, _ = io.Copy(c, c) })
			r, err := stormOp.Call(s.app, stormArgs{To: to.String(), Count: count})
			if err != nil || r.OK != count {
				t.Errorf("%d of %d connections were right; the others: %v (%v)", r.OK, count, r.Errors, err)
			}
		})
	}
}

// TestRootlessRefusals: whom nobody can reach is told as it would be by the root backends, and so is the user.
func TestRootlessRefusals(t *testing.T) {
	t.Parallel()
	s := newSession(t)
	s.user = ordinary
	s.ext.Blackhole(nobody4+"/32", nobody6+"/128")
	s.askNeighboursOften()
	app, said := s.insideSaying(t, "--follow", "--connect-timeout", "2s")
	s.app = app
	for name, c := range map[string]struct{ to4, to6, reason string }{
		"refused":     {server4 + ":1", "[" + server6 + "]:1", "upstream_connect_refused"},
		"unreachable": {absent4 + ":80", "[" + absent6 + "]:80", "upstream_unreachable"},
		"black hole":  {nobody4 + ":80", "[" + nobody6 + "]:80", "upstream_connect_timeout"},
	} {
		for family, d := range map[string]testnet.Dial{"v4": {To: c.to4}, "v6": {To: c.to6}, "mapped": {To: c.to4, Mapped: true}} {
			t.Run(name+"/"+family, func(t *testing.T) {
				conn, err := s.app.Dial(d)
				if err == nil {
					_, err = conn.Read(make([]byte, 1))
					conn.Close()
				}
				if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("%v, want ECONNREFUSED or ECONNRESET", err)
				}
				said.Wait(t, "it is told why", func(line string) bool {
					return strings.Contains(line, " -> "+d.To+" closed: "+c.reason+",")
				})
			})
		}
	}
	must(t, "ip", run(t, s.ns.Command(nil, "ip", "-6", "route", "del", "default")))
	s.app = s.inside(t)
	t.Run("no route", func(t *testing.T) {
		if _, err := s.app.Dial(testnet.Dial{To: "[2001:db8::1]:80"}); !errors.Is(err, syscall.ENETUNREACH) {
			t.Errorf("%v, want ENETUNREACH", err)
		}
	})
}

// TestRootlessLocalhost: the command's own listener is met first, the host's next; and at the host's own addresses too.
func TestRootlessLocalhost(t *testing.T) {
	t.Parallel()
	s := newRootless(t)
	serve := func(where func(network, addr string, handler func(*net.TCPConn)) *testnet.Server, who, network, addr string) {
		where(network, addr, func(c *net.TCPConn) { _, _ = io.WriteString(c, who) })
	}
	says := func(t *testing.T, host string, port int, want string) {
		t.Helper()
		c, err := s.app.Dial(testnet.Dial{To: net.JoinHostPort(host, fmt.Sprint(port))})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if b, err := io.ReadAll(c); err != nil || string(b) != want {
			t.Errorf("%q, %v; want the %s's", b, err, want)
		}
	}
	for i, host := range []string{"127.0.0.1", "::1", pod4, pod6} {
		t.Run(host, func(t *testing.T) {
			port, only := 7100+i, 7200+i
			serve(s.ns.Serve, "host", "tcp", net.JoinHostPort(host, fmt.Sprint(port)))
			serve(s.ns.Serve, "host", "tcp", net.JoinHostPort(host, fmt.Sprint(only)))
			serve(s.app.Serve, "command", "tcp", net.JoinHostPort(host, fmt.Sprint(port)))
			says(t, host, port, "command")
			says(t, host, only, "host")
		})
	}
	t.Run("a listener at every address is none of another host's", func(t *testing.T) {
		serve(s.app.Serve, "command", "tcp4", "0.0.0.0:7300")
		s.ext.Serve("tcp4", "0.0.0.0:7300", func(c *net.TCPConn) { _, _ = io.WriteString(c, "other") })
		says(t, server4, 7300, "other")
		says(t, pod4, 7300, "command")
	})
}

// TestRootlessWithoutIPv6: where the host has none the command has none.
func TestRootlessWithoutIPv6(t *testing.T) {
	t.Parallel()
	s := newSession(t)
	s.user = ordinary
	s.ns.Sysctl("net.ipv6.conf.all.disable_ipv6", "1")
	s.app = s.inside(t)
	if _, err := s.app.Dial(testnet.Dial{To: "[::1]:80"}); !errors.Is(err, syscall.EADDRNOTAVAIL) && !errors.Is(err, syscall.ENETUNREACH) {
		t.Errorf("to ::1: %v, want EADDRNOTAVAIL or ENETUNREACH", err)
	}
	carriesAll(t, s.outs()[:1])
}

// TestRootlessDatagrams: answers come from whom the command asked, and refusals at once; each flow is reported.
func TestRootlessDatagrams(t *testing.T) {
	t.Parallel()
	s := newSession(t)
	s.user = ordinary
	app, said := s.insideSaying(t, "--follow")
	s.app = app
	for _, host := range []string{server4, server6, pod4, "127.0.0.1"} {
		t.Run(host, func(t *testing.T) {
			for range 3 {
				s.udp(t, host)
			}
		})
		t.Run(host+"/refused", func(t *testing.T) {
			if answer, err := udpOp.Call(s.app, net.JoinHostPort(host, "1")); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%q, %v; want ECONNREFUSED", answer, err)
			}
			said.Wait(t, "the flow is reported", func(line string) bool {
				return strings.Contains(line, " outbound udp ") && strings.HasSuffix(line, " -> "+net.JoinHostPort(host, "1")+" opened")
			})
		})
	}
}

// TestRootlessNobodyThere: a host that does not answer for itself is told as such, for datagrams too; ping is not answered in
// anybody's name, not even to who is root in there.
func TestRootlessNobodyThere(t *testing.T) {
	t.Parallel()
	s := newRootless(t)
	s.askNeighboursOften()
	for _, host := range []string{absent4, absent6} {
		t.Run(host, func(t *testing.T) {
			if answer, err := udpOp.Call(s.app, net.JoinHostPort(host, "53")); !errors.Is(err, syscall.EHOSTUNREACH) {
				t.Errorf("%q, %v; want EHOSTUNREACH", answer, err)
			}
		})
	}
	ping := testnet.NeedProgram(t, "busybox", "busybox-static")
	for _, host := range []string{server4, server6} {
		if r := run(t, s.raw([]string{"--map-root"}, ping, "ping", "-c1", "-W2", host)); r.code == 0 || strings.Contains(r.stdout, " bytes from ") {
			t.Errorf("ping of %s: exit code %d\n%s%s", host, r.code, r.stdout, r.stderr)
		}
	}
	if r := run(t, s.raw([]string{"--map-root"}, ping, "ping", "-c1", "-W2", "127.0.0.1")); r.code != 0 {
		t.Errorf("ping of itself: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
}

// TestRootlessPublished: others connect to the command's servers, which see who they are.
func TestRootlessPublished(t *testing.T) {
	t.Parallel()
	s := newSession(t)
	s.user = ordinary
	s.app = s.inside(t, "--publish", "7000:7001", "--publish", pod4+":7002")
	saw := make(chan seen, 1)
	s.app.Serve("tcp", "[::]:7001", echo(saw))
	client := func(host string, port int) (net.Conn, error) {
		return s.ext.Dial("tcp", net.JoinHostPort(host, fmt.Sprint(port)))
	}
	for _, tt := range [][2]string{{pod4, client4}, {pod6, client6}} {
		t.Run(tt[0], func(t *testing.T) {
			c, err := client(tt[0], 7000)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if err := exchange(c, "to the command"); err != nil {
				t.Fatal(err)
			}
			if far, own := <-saw, addrPort(c.LocalAddr()); unmap(far.peer) != own || unmap(far.own) != netip.MustParseAddrPort(net.JoinHostPort(tt[0], "7001")) {
				t.Errorf("the server sees %s from %s, want port 7001 of %s, from %s", far.own, far.peer, tt[0], own)
			}
		})
	}
	t.Run("nobody listens", func(t *testing.T) {
		c, err := client(pod4, 7002)
		if err == nil {
			_, err = c.Read(make([]byte, 1))
			c.Close()
		}
		if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%v, want ECONNREFUSED or ECONNRESET", err)
		}
	})
	t.Run("at one address alone", func(t *testing.T) {
		if _, err := client(pod6, 7002); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%v, want ECONNREFUSED", err)
		}
	})
}

// TestRootlessPublishesAll: what the command listens on is at the host's loopback addresses for as long, and told.
func TestRootlessPublishesAll(t *testing.T) {
	t.Parallel()
	s := newSession(t)
	s.user = ordinary
	app, said := s.insideSaying(t, "--publish-all")
	s.ns.Serve("tcp", "127.0.0.1:7402", func(*net.TCPConn) {})
	for addr, at := range map[string][]string{
		"[::]:7400":    {"127.0.0.1:7400", "[::1]:7400"},
		pod4 + ":7401": {"127.0.0.1:7401"},
		"[::1]:7402":   {"[::1]:7402"},
	} {
		server := app.Serve("tcp", addr, func(c *net.TCPConn) { _, _ = io.Copy(c, c); c.Close() })
		for _, at := range at {
			at := netip.MustParseAddrPort(at)
			s.ns.WaitSocket(t, at.String()+" is published", func(x testnet.Socket) bool { return x.State == testnet.Listen && x.Local == at })
			c, err := s.ns.Dial("tcp", at.String())
			if err != nil {
				t.Fatal(err)
			}
			if err := exchange(c, "to the command"); err != nil {
				t.Errorf("%s: %v", at, err)
			}
			c.Close()
		}
		server.Close()
		testnet.Wait(t, "nothing is published any more", func() bool {
			c, err := s.ns.Dial("tcp", at[0])
			if err == nil {
				c.Close()
			}
			return errors.Is(err, syscall.ECONNREFUSED)
		})
	}
	app.Serve("tcp4", "0.0.0.0:7402", func(c *net.TCPConn) { c.Close() })
	for _, want := range []string{
		"the command's port 7400 is at 127.0.0.1:7400 and [::1]:7400\n",
		"the command's port 7401 is at 127.0.0.1:7401\n",
		"the command's port 7402 is not at 127.0.0.1:7402: ",
	} {
		testnet.Wait(t, "it is said: "+want, func() bool { return strings.Contains(said.String(), want) })
	}
}

// TestRootlessHasNoRights: the command is who it was, and may do no more than before.
func TestRootlessHasNoRights(t *testing.T) {
	t.Parallel()
	s := newSession(t)
	s.user = ordinary
	const who = `id -u; id -g; grep -E '^(Cap(Eff|Prm|Inh|Amb)|Sig(Blk|Ign)|NoNewPrivs)' /proc/self/status; ls /proc/self/fd; umask; ulimit -a; cat /proc/self/oom_score_adj`
	bare := s.ns.Command(s.cg, "/bin/sh", "-c", who)
	bare.User = ordinary
	if r, want := run(t, s.command(nil, who)), run(t, bare); r.stdout != want.stdout {
		t.Errorf("the command says\n%swithout run it says\n%s%s", r.stdout, want.stdout, r.stderr)
	}
	for _, forbidden := range []string{"mount -t tmpfs none /mnt", "ip link set lo down", "nft flush ruleset || iptables -F"} {
		if r := run(t, s.command(nil, forbidden+" 2>/dev/null && exit 0; exit 9")); r.code != 9 {
			t.Errorf("%s: exit code %d", forbidden, r.code)
		}
	}
	if r := run(t, s.command(nil, "kill -9 1; exit 9")); r.code != 9 {
		t.Errorf("the command ended its keeper: exit code %d\n%s", r.code, r.stderr)
	}
	if r := run(t, s.command(nil, "cat /proc/sys/net/ipv4/tcp_congestion_control")); r.stdout != "reno\n" {
		t.Errorf("congestion control is %q; want reno, which does not pace itself\n%s", r.stdout, r.stderr)
	}
	if r := run(t, s.raw([]string{"--map-root"}, "id", "-u")); r.stdout != "0\n" {
		t.Errorf("--map-root: id says %q\n%s", r.stdout, r.stderr)
	}
}

// TestRootlessUsage: what it cannot do it refuses to promise.
func TestRootlessUsage(t *testing.T) {
	t.Parallel()
	s := newSession(t)
	s.user = ordinary
	for _, flags := range [][]string{{"--exclude-outbound-ports=80"}, {"--on-proxy-down=open"}, {"--netns=x"}, {"--publish=a"}, {"--publish=1:2:3:4"}, {"--publish=0"}, {"--backend=x"}} {
		r := run(t, s.raw(flags, "true"))
		if name, _, _ := strings.Cut(flags[0], "="); r.code != config.ExitUsage || !strings.Contains(r.stderr, name) {
			t.Errorf("%v: exit code %d\n%s", flags, r.code, r.stderr)
		}
	}
	wantFault(t, run(t, s.raw([]string{"--publish=80"}, "true")), config.ExitNoPerm, "--publish 80")
	wantFault(t, run(t, s.raw([]string{"--publish=192.0.2.200:8080"}, "true")), config.ExitConfig, "--publish")
	if r := run(t, s.raw([]string{"--dry-run"}, "true")); r.code != 0 || !strings.Contains(r.stdout, pod4) || !strings.Contains(r.stdout, "tproxy to 127.0.0.1:") {
		t.Errorf("--dry-run: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	s.user = nil
	wantFault(t, run(t, s.raw([]string{"--publish=80"}, "true")), config.ExitUsage, "--publish")
}

// TestRootlessForbidden: a host that lets no user have namespaces says which switch it is.
func TestRootlessForbidden(t *testing.T) {
	t.Parallel()
	s := newSession(t)
	s.user = ordinary
	// A user namespace has limits of its own (user_namespaces(7)).
	script := `echo 0 >/proc/sys/user/max_net_namespaces && exec setpriv --bounding-set=-all --inh-caps=-all "$@"`
	cmd := s.ns.Command(s.cg, "unshare", append([]string{"--user", "--map-root-user", "/bin/sh", "-c", script, "sh", pillionPath}, "run", "--backend", "rootless", "--", "true")...)
	cmd.User = ordinary
	r := run(t, cmd)
	if !strings.Contains(r.stderr, "user.max_net_namespaces is 0") || !strings.Contains(r.stderr, "sudo pillion run") || r.code != config.ExitUnavailable {
		t.Errorf("exit code %d\n%s", r.code, r.stderr)
	}
}

// TestRootlessEnds: whoever is killed, nothing stays: no process, no namespace, no port.
func TestRootlessEnds(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		end  func(*testnet.Cmd, int)
	}{
		{"pillion is killed", func(cmd *testnet.Cmd, _ int) { cmd.Kill() }},
		{"the keeper is killed", func(_ *testnet.Cmd, keeper int) { _ = syscall.Kill(keeper, syscall.SIGKILL) }},
		{"both are killed", func(cmd *testnet.Cmd, keeper int) { _ = syscall.Kill(keeper, syscall.SIGKILL); cmd.Kill() }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := newSession(t)
			s.user = ordinary
			mark := "MARK=" + s.ns.Name
			cmd := s.command([]string{"--publish", "7000"}, `setsid sh -c 'trap "" TERM HUP; while :; do sleep 1000; done' & echo ready; wait`)
			out := &testnet.Lines{}
			cmd.Env, cmd.Stdout, cmd.Stderr = append(os.Environ(), mark), out, out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			out.Wait(t, "the command is ready", func(l string) bool { return l == "ready" })
			keeper := -1
			for _, pid := range processesWith(mark) {
				if b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); string(b) == "pillion\x00keep\x00" {
					keeper = pid
				}
			}
			if keeper < 0 {
				t.Fatalf("there is no keeper: %s", out)
			}
			tt.end(cmd, keeper)
			if err := cmd.Wait(); err == nil {
				t.Error("run ended with 0")
			}
			testnet.Wait(t, "no process is left", func() bool { return len(processesWith(mark)) == 0 })
			if _, err := s.ext.Dial("tcp", net.JoinHostPort(pod4, "7000")); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("the published port: %v, want ECONNREFUSED", err)
			}
		})
	}
}

// processesWith are those with a word in their environment: in a namespace of its own a process has another number.
func processesWith(mark string) (pids []int) {
	all, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, file := range all {
		b, _ := os.ReadFile(file) // nothing, of a zombie
		if slices.Contains(strings.Split(string(b), "\x00"), mark) {
			var pid int
			fmt.Sscanf(file, "/proc/%d/", &pid)
			pids = append(pids, pid)
		}
	}
	return pids
}

// TestRootlessNested: a run inside a run captures what that one captured.
func TestRootlessNested(t *testing.T) {
	t.Parallel()
	s := newSession(t)
	s.user = ordinary
	for _, w := range s.outs()[:2] {
		t.Run(w.name, func(t *testing.T) {
			saw := make(chan seen, 1)
			to := w.start(echo(saw))
			r := run(t, s.command(nil, fmt.Sprintf("%s=%s %s run -- %s", childEnv, to, carrierPath, selfPath)))
			must(t, "run in run", r)
			if far := <-saw; far.peer.Addr() != w.from {
				t.Errorf("the server sees %s, want %s", far.peer, w.from)
			}
		})
	}
}
