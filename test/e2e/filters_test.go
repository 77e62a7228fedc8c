// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/test/testnet"
)

// The backends by packet filters, case by case of what ebpf has tests of its own for; README.md in this folder has the list.

// byFilter runs a test with each of them.
func byFilter(t *testing.T, test func(*testing.T, backend)) {
	byEach(t, filterBackends, test)
}

// byRules is the same where the kernel alone decides: each way to capture once, by either flavour. Both have the same rules, and
// what depends on the flavour is asked of them all by the other tests.
func byRules(t *testing.T, test func(*testing.T, backend)) {
	byEach(t, []backend{filterBackends[0], filterBackends[3], filterBackends[4]}, test)
}

func byEach(t *testing.T, backends []backend, test func(*testing.T, backend)) {
	for _, b := range backends {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			test(t, b)
		})
	}
}

// TestFilterAddresses: every path is captured, and each end sees what it should: with tproxy the truth at all four ends,
// with redirect all of it but the client's address at the app.
func TestFilterAddresses(t *testing.T) {
	byFilter(t, func(t *testing.T, b backend) {
		p := newCapturedBy(t, b)
		for _, w := range p.paths() {
			t.Run(w.name, func(t *testing.T) { p.through(t, w) })
		}
	})
}

// TestFilterAppOfTheProxysUser: an app that runs as the proxy's user is captured all the same, unless that user is trusted.
func TestFilterAppOfTheProxysUser(t *testing.T) {
	byRules(t, func(t *testing.T, b backend) {
		p := newCapturedBy(t, b)
		as1666 := p.ns.AgentAs(p.appCG, &testnet.User{UID: config.ProxyUID, GID: config.ProxyUID})
		for _, w := range by(as1666, p.outbound()) {
			p.through(t, w)
		}
		p.init("--trust-proxy-user")
		for _, w := range by(as1666, p.outbound()) {
			p.direct(t, w)
		}
	})
}

// TestFilterWaysToConnect: whatever an app does to its socket before it connects, the connection is captured.
func TestFilterWaysToConnect(t *testing.T) {
	byRules(t, func(t *testing.T, b backend) {
		p := newCapturedBy(t, b)
		for i, w := range p.outbound() {
			own, second := pod4, second4
			if w.from.Is6() {
				own, second = pod6, second6
			}
			for _, tt := range []struct {
				name string
				from string
				dial testnet.Dial
			}{
				{"blocking", own, testnet.Dial{}},
				{"non-blocking", own, testnet.Dial{NonBlock: true}},
				{"bound to an address", own, testnet.Dial{From: net.JoinHostPort(own, "0")}},
				{"bound to another address", second, testnet.Dial{From: net.JoinHostPort(second, "0")}},
				{"bound to a port", own, testnet.Dial{From: net.JoinHostPort(own, fmt.Sprint(7777+i)), Reuse: true}},
				{"bound to a device", own, testnet.Dial{Device: "eth0"}},
				{"MPTCP", own, testnet.Dial{MPTCP: true}},
				{"with a mark", own, testnet.Dial{Mark: 5}},
			} {
				t.Run(w.name+"/"+tt.name, func(t *testing.T) {
					if b.redirects() && tt.dial.Device != "" {
						t.Skip("a socket bound to a device cannot reach a listener on loopback: a limit of REDIRECT, see README.md")
					}
					if tt.dial.MPTCP {
						testnet.Need(t, testnet.MPTCP)
					}
					w := w
					w.from = netip.MustParseAddr(tt.from)
					w.dial = func(to netip.AddrPort) (*testnet.Conn, error) {
						d := tt.dial
						d.To, d.Mapped, d.Timeout = to.String(), w.name == "out/mapped", time.Minute
						return p.app.Dial(d)
					}
					p.through(t, w)
				})
			}
		}
	})
}

// TestFilterLeavesAlone: what stays on this host is nobody's business.
func TestFilterLeavesAlone(t *testing.T) {
	byFilter(t, func(t *testing.T, b backend) {
		p := newCapturedBy(t, b)
		for _, to := range []string{"127.0.0.1", "127.0.0.2", "::1", pod4, second4, pod6} {
			t.Run(to, func(t *testing.T) {
				w := p.paths()[0]
				w.to, w.serve, w.serveNet, w.serveHost = netip.MustParseAddr(to), p.app.Serve, "tcp", "::"
				p.direct(t, w)
			})
		}
	})
}

// TestFilterNobodyListens: a client of a port without a listener is refused by the kernel as ever; an app whose server
// refuses is connected to the sidecar, and reset.
func TestFilterNobodyListens(t *testing.T) {
	byRules(t, func(t *testing.T, b backend) {
		p := newCapturedBy(t, b)
		for _, w := range p.paths() {
			t.Run(w.name, func(t *testing.T) {
				s, to := w.server(func(*net.TCPConn) {})
				s.Close()
				c, err := w.dial(to)
				if w.direction == "inbound" {
					if !errors.Is(err, syscall.ECONNREFUSED) {
						t.Errorf("%v, want ECONNREFUSED", err)
					}
					return
				}
				if err == nil {
					defer c.Close()
					_, err = c.Read(make([]byte, 1))
				}
				if !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("%v, want ECONNRESET", err)
				}
			})
		}
	})
}

// TestFilterPortsUsedAgain: one source port, twenty times, against a server that closes first; and many connections out of
// few ports, closed by either side.
func TestFilterPortsUsedAgain(t *testing.T) {
	byRules(t, func(t *testing.T, b backend) {
		p := newCapturedBy(t, b)
		world := p.ext.Agent(nil)
		stray := p.countStray()
		for i, w := range p.paths() {
			t.Run(w.name+"/one port", func(t *testing.T) {
				wantThrough(t, p.client(w, world), w.again(uint16(61001+i), serverFirst))
			})
			w.port = strayPort + uint16(i)
			for _, e := range []ending{serverFirst, clientFirst, clientResets} {
				t.Run(w.name+"/"+string(e), func(t *testing.T) {
					s, to := w.server(sayPeer(e))
					defer s.Close()
					wantThrough(t, p.client(w, world), connectsArgs{
						To: to, Mapped: w.name == "out/mapped", Count: 400, Workers: 16, Ports: w.ports, Ending: e,
					})
				})
			}
		}
		if packets := stray(); packets != "0 0" {
			t.Errorf("%s packets of IPv4 and IPv6 went from the app itself to the server, want none", packets)
		}
	})
}

// strayPort and the nine after it are servers that no packet reaches but from the proxy.
const strayPort = 8000

// countStray counts what arrives there from ports that apps have and the proxy has not.
func (p *pod) countStray() func() string {
	p.t.Helper()
	for _, tool := range []string{"iptables-nft", "ip6tables-nft"} {
		must(p.t, tool, run(p.t, p.ext.Command(nil, tool, "-t", "raw", "-A", "PREROUTING", "-p", "tcp", "--sport", "32768:65535",
			"--dport", fmt.Sprintf("%d:%d", strayPort, strayPort+9))))
	}
	return func() string {
		var packets []string
		for _, tool := range []string{"iptables-nft", "ip6tables-nft"} {
			r := run(p.t, p.ext.Command(nil, tool, "-t", "raw", "-nvxL", "PREROUTING"))
			must(p.t, tool, r)
			lines := strings.Split(strings.TrimSpace(r.stdout), "\n")
			packets = append(packets, strings.Fields(lines[len(lines)-1])[0])
		}
		return strings.Join(packets, " ")
	}
}

// TestFilterSYNCookies: a handshake by cookie keeps no socket between SYN and ACK; its last ACK must come to the proxy, or
// the client believes that it is connected and is not.
func TestFilterSYNCookies(t *testing.T) {
	byRules(t, func(t *testing.T, b backend) {
		p := newCapturedBy(t, b)
		p.ns.Sysctl("net.ipv4.tcp_syncookies", "2") // after init, whose probes listen at one address: a limit, see README.md
		for _, w := range p.paths() {
			t.Run(w.name, func(t *testing.T) {
				before := cookies(t, p.ns)
				for range 3 {
					p.through(t, w)
				}
				if got := cookies(t, p.ns) - before; got < 3 {
					t.Errorf("%d handshakes by cookie, want at least 3: this test shows nothing", got)
				}
			})
		}
	})
}

// TestFilterOurMarks: an app that gives its socket a mark of ours may harm itself, but is not let by.
func TestFilterOurMarks(t *testing.T) {
	byFilter(t, func(t *testing.T, b backend) {
		if b.redirects() {
			t.Skip("redirect reads no marks: TestFilterWaysToConnect has one")
		}
		p := newCapturedBy(t, b)
		for _, w := range p.outbound() {
			for role := config.RoleOut; role <= config.RoleReply; role++ {
				t.Run(fmt.Sprintf("%s/role %d", w.name, role), func(t *testing.T) {
					saw := make(chan seen, 10)
					to := w.start(echo(saw))
					c, err := p.app.Dial(testnet.Dial{To: to.String(), Mapped: w.name == "out/mapped", Mark: int(config.Slot(0).Mark(role)), Timeout: 2 * time.Second})
					if err != nil {
						t.Logf("connect: %v", err)
						return
					}
					defer c.Close()
					_ = c.SetDeadline(time.Now().Add(2 * time.Second)) // the mark may have made a connection that goes nowhere
					t.Logf("exchange: %v", exchange(c, "marked"))
					select {
					case s := <-saw:
						if s.peer == unmap(c.Own) {
							t.Error("passed by")
						}
					default:
					}
				})
			}
		}
	})
}

// TestFilterCarriesAll: bytes of both directions at once, an end of one while the other goes on, and a reset.
func TestFilterCarriesAll(t *testing.T) {
	byRules(t, func(t *testing.T, b backend) {
		carriesAll(t, newCapturedBy(t, b).paths())
	})
}

// carriesAll checks that bytes go both ways over each path, and each kind of end gets to the other side.
func carriesAll(t *testing.T, ways []path) {
	t.Helper()
	for i, w := range ways {
		t.Run(w.name+"/both ways", func(t *testing.T) {
			up, down := payload(uint64(2*i+100), 4<<20), payload(uint64(2*i+101), 4<<20)
			got := make(chan error, 1)
			to := w.start(func(c *net.TCPConn) { got <- both(c, down, up) })
			c, err := w.dial(to)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if err := errors.Join(both(c.TCPConn, up, down), <-got); err != nil {
				t.Error(err)
			}
		})
		t.Run(w.name+"/half closed", func(t *testing.T) {
			to := w.start(func(c *net.TCPConn) {
				b, _ := io.ReadAll(c)
				fmt.Fprintf(c, "%d bytes", len(b))
			})
			c, err := w.dial(to)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_, werr := c.Write(make([]byte, 100_000))
			b, rerr := []byte(nil), c.CloseWrite()
			if rerr == nil {
				b, rerr = io.ReadAll(c)
			}
			if err := errors.Join(werr, rerr); err != nil || string(b) != "100000 bytes" {
				t.Errorf("%q, %v", b, err)
			}
		})
		t.Run(w.name+"/reset", func(t *testing.T) {
			to := w.start(func(c *net.TCPConn) {
				_ = readExactly(c, "x")
				_ = c.SetLinger(0)
			})
			c, err := w.dial(to)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if _, err := c.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%v, want ECONNRESET", err)
			}
		})
	}
}

// both sends and receives at once, and wants what it receives.
func both(c *net.TCPConn, send, want []byte) error {
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(send)
		sent <- errors.Join(err, c.CloseWrite())
	}()
	got, err := io.ReadAll(c)
	if err == nil && wantSum(got) != wantSum(want) {
		err = fmt.Errorf("read %s, want %s", wantSum(got), wantSum(want))
	}
	return errors.Join(err, <-sent)
}

// TestFilterWithoutProxy: new connections wait for a proxy (hold), or fail at once (closed, of redirect); those that it
// had are reset; nothing passes by.
func TestFilterWithoutProxy(t *testing.T) {
	byRules(t, func(t *testing.T, b backend) {
		t.Run("hold", func(t *testing.T) {
			p := newPodBy(t, b)
			p.init()
			var waiting []*attempt
			for _, w := range p.paths() {
				waiting = append(waiting, p.attempt(w))
			}
			testnet.Wait(t, "SYNs are repeated", func() bool {
				n := 0
				for _, ns := range []*testnet.Namespace{p.ns, p.ext} {
					for _, s := range ns.Sockets() {
						if s.State == testnet.SynSent && s.Retransmits > 0 {
							n++
						}
					}
				}
				return n >= len(waiting)
			})
			p.startProxyOf(b)
			for i, a := range waiting {
				a.wait(t)
				if a.err != nil {
					t.Errorf("%s: %v", p.paths()[i].name, a.err)
					continue
				}
				if err := errors.Join(exchange(a.c, "waited"), finish(a.c.TCPConn)); err != nil {
					t.Errorf("%s: %v", p.paths()[i].name, err)
				}
				p.proxy.waitRecordOf(t, a.c)
			}
		})
		t.Run("closed", func(t *testing.T) {
			p := newPodBy(t, b)
			r := run(t, p.initCmd("--on-proxy-down=closed", "--on-proxy-down-inbound=closed"))
			if !b.redirects() {
				wantFault(t, r, config.ExitConfig, "--on-proxy-down closed", "--on-proxy-down-inbound closed", "TPROXY")
				return
			}
			must(t, "init", r)
			for _, w := range p.paths() {
				to := w.start(func(*net.TCPConn) {})
				if c, err := w.dial(to); !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("%s: %v, %v, want ECONNREFUSED", w.name, c, err)
				}
			}
		})
		t.Run("open", func(t *testing.T) {
			p := newPodBy(t, b)
			wantFault(t, run(t, p.initCmd("--on-proxy-down=open")), config.ExitConfig, "--on-proxy-down open", "--backend ebpf")
		})
		t.Run("killed", func(t *testing.T) {
			p := newCapturedBy(t, b)
			var open []*testnet.Conn
			for _, w := range p.paths() {
				to := w.start(echo(make(chan seen, 1)))
				c, err := w.dial(to)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				if err := exchange(c, "alive"); err != nil {
					t.Fatal(err)
				}
				open = append(open, c)
			}
			p.proxy.Kill()
			for i, c := range open {
				if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("%s: %v, want ECONNRESET", p.paths()[i].name, err)
				}
			}
			p.startProxyOf(b)
			for _, w := range p.paths() {
				p.through(t, w)
			}
		})
	})
}

// TestFilterSelection: the flags mean what they mean to ebpf, and by interface too.
func TestFilterSelection(t *testing.T) {
	byRules(t, func(t *testing.T, b backend) {
		more := []selection{
			{"exclude an outbound interface", func(*pod) []string { return []string{"--exclude-outbound-interfaces=eth0"} }, func(p *pod) []selectionCase {
				return []selectionCase{{"outbound", p.outbound(), false}, {"inbound", p.inbound(), true}}
			}},
			{"include outbound interfaces", func(*pod) []string { return []string{"--include-outbound-interfaces=e*,lo"} }, func(p *pod) []selectionCase {
				return []selectionCase{{"outbound", p.outbound(), true}}
			}},
			{"include other outbound interfaces", func(*pod) []string { return []string{"--include-outbound-interfaces=net1"} }, func(p *pod) []selectionCase {
				return []selectionCase{{"outbound", p.outbound(), false}, {"inbound", p.inbound(), true}}
			}},
		}
		for _, tt := range append(selections(), more...) {
			t.Run(tt.name, func(t *testing.T) {
				p := newPodBy(t, b)
				flags := tt.flags(p)
				r := run(t, p.initCmd(flags...))
				has := func(what string) bool { return strings.Contains(strings.Join(flags, " "), what) }
				switch {
				case has("cgroups"):
					wantFault(t, r, config.ExitConfig, "--exclude-cgroups")
					return
				case b.untracked() && has("uids"):
					wantFault(t, r, config.ExitConfig, "--include-uids", "nf_conntrack", "--backend ebpf or redirect")
					return
				}
				must(t, "init", r)
				p.startProxyOf(b)
				for _, c := range tt.cases(p) {
					for _, w := range c.paths {
						t.Run(fmt.Sprintf("%s/%s", w.name, c.name), func(t *testing.T) { p.goes(t, w, c.captured) })
					}
				}
			})
		}
	})
}

// TestFilterSession: the port of the SSH server by which whoever runs init is logged in is left alone, also behind sudo,
// unless it is named.
func TestFilterSession(t *testing.T) {
	byFilter(t, func(t *testing.T, b backend) {
		for _, tt := range []struct {
			name     string
			args     []string
			captured bool
		}{{"left alone", nil, false}, {"named", []string{"--include-inbound-ports=8022-8023,8022"}, true}} {
			t.Run(tt.name, func(t *testing.T) {
				p := newPodBy(t, b)
				plain := p.initCmd(tt.args...)
				words := append([]string{"-c", `env -u SSH_CONNECTION "$@"; exit $?`, "sh"}, plain.Args...)
				cmd := p.ns.Command(nil, "/bin/sh", words...)
				cmd.Env = append(os.Environ(), b.env...)
				cmd.Env = append(cmd.Env, fmt.Sprintf("SSH_CONNECTION=%s 50022 %s 8022", client4, pod4))
				r := run(t, cmd)
				must(t, "init", r)
				if said := strings.Contains(r.stderr, "by which you are logged in"); said == tt.captured {
					t.Errorf("init said %q", r.stderr)
				}
				p.startProxyOf(b)
				for _, w := range p.inbound() {
					w.port = 8022
					p.goes(t, w, tt.captured)
					w.port = 8023
					p.goes(t, w, true)
				}
			})
		}
	})
}

// TestFilterOlderConnections: what was open before the capture goes on as it was, in both directions.
func TestFilterOlderConnections(t *testing.T) {
	byFilter(t, func(t *testing.T, b backend) {
		p := newPodBy(t, b)
		var open []*testnet.Conn
		for _, w := range p.paths() {
			c, err := w.dial(w.start(echo(make(chan seen, 1))))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			open = append(open, c)
		}
		alive := func(when string) {
			t.Helper()
			for i, c := range open {
				if err := exchange(c, "still here"); err != nil {
					t.Errorf("%s: %s: %v", p.paths()[i].name, when, err)
				}
			}
		}
		alive("before")
		p.init()
		alive("after init")
		p.init("--exclude-outbound-ports=1", "--exclude-inbound-ports=1")
		alive("after another init")
		must(t, "clean", p.clean())
		alive("after clean")
		for i, c := range open {
			if err := finish(c.TCPConn); err != nil {
				t.Errorf("%s: %v", p.paths()[i].name, err)
			}
		}
	})
}

// TestFilterRefusals: what cannot be meant with these backends is refused, and leaves nothing.
func TestFilterRefusals(t *testing.T) {
	byFilter(t, func(t *testing.T, b backend) {
		p := newPodBy(t, b)
		before := p.hostState()
		for _, tt := range []struct {
			args []string
			says string
		}{
			{[]string{"--cgroup=" + p.cg.Path}, "the whole network namespace"},
			{[]string{"--exclude-cgroups=" + p.initCG.Path}, "--exclude-cgroups"},
		} {
			t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
				wantFault(t, run(t, p.initCmd(tt.args...)), config.ExitConfig, tt.says, "--backend ebpf")
				wantState(t, "after the refusal", before, p.hostState())
			})
		}
	})
}
