// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/test/testnet"
	"golang.org/x/sys/unix"
)

// filter runs a packet filter's program in the pod.
func (p *pod) filter(args ...string) {
	p.t.Helper()
	must(p.t, strings.Join(args, " "), run(p.t, p.ns.Command(nil, args[0], args[1:]...)))
}

// tool is the program of a backend by packet filters.
func (b backend) tool(v6 bool) string {
	name := "iptables-nft"
	if strings.HasSuffix(b.name, "legacy") {
		name = "iptables-legacy"
	}
	if v6 {
		name = strings.Replace(name, "ip", "ip6", 1)
	}
	return name
}

// table is the one in which the backend takes connections.
func (b backend) table() string {
	if b.redirects() {
		return "nat"
	}
	return "mangle"
}

// TestFilterLeavesNothing: installed, installed again, changed, and taken away: everything is as it was, beside what others
// have there.
func TestFilterLeavesNothing(t *testing.T) {
	byFilter(t, func(t *testing.T, b backend) {
		for _, tt := range []struct {
			name    string
			prepare func(*pod)
		}{
			{"nothing there", func(*pod) {}},
			{"others' rules", func(p *pod) {
				for _, v6 := range []bool{false, true} {
					p.filter(b.tool(v6), "-t", "filter", "-A", "FORWARD", "-j", "ACCEPT", "-m", "comment", "--comment", "it's somebody's \"own\"")
					p.filter(b.tool(v6), "-t", b.table(), "-N", "OTHERS")
					p.filter(b.tool(v6), "-t", b.table(), "-A", "OUTPUT", "-p", "tcp", "--dport", "9", "-j", "OTHERS")
				}
			}},
			{"sysctls set", func(p *pod) {
				p.ns.Sysctl("net.ipv4.tcp_fwmark_accept", "1")
				p.ns.Sysctl("net.ipv6.fwmark_reflect", "1")
			}},
		} {
			t.Run(tt.name, func(t *testing.T) {
				p := newPodBy(t, b)
				tt.prepare(p)
				before := p.hostState()
				p.init()
				once := p.hostState()
				if r := run(t, p.initCmd("-o", "json")); r.code != 0 || !strings.Contains(r.stdout, `"changed": null`) {
					t.Errorf("the second init: exit code %d, and says it changed something:\n%s%s", r.code, r.stdout, r.stderr)
				}
				wantState(t, "after the second init", once, p.hostState())
				p.init("--exclude-outbound-ports=7", "--include-inbound-cidrs=10.0.0.0/8")
				p.init()
				wantState(t, "after another policy and back", once, p.hostState())
				must(t, "status", run(t, p.pillion("status")))
				must(t, "verify", run(t, p.pillion("verify")))
				must(t, "clean", p.clean())
				wantState(t, "after clean", before, p.hostState())
				wantFault(t, p.clean(), config.ExitFailure, "nothing of pillion is installed")
				wantState(t, "after the second clean", before, p.hostState())
			})
		}
	})
}

// TestFilterDrift: what somebody takes away or puts before us is seen by status, which then fails, and mended by init.
func TestFilterDrift(t *testing.T) {
	byFilter(t, func(t *testing.T, b backend) {
		p := newPodBy(t, b)
		before := p.hostState()
		p.init()
		once := p.hostState()
		for _, tt := range []struct {
			name string
			do   []string
			says string
			undo []string
		}{
			{"a jump", []string{"-t", b.table(), "-F", "OUTPUT"}, "jumps", nil},
			{"a chain", []string{"-t", b.table(), "-F", "PILLION_OUT"}, "rules", nil},
			{"a rule", []string{"-t", b.table(), "-D", "PILLION_OUT", "2"}, "rules", nil},
			{"somebody before us", []string{"-t", b.table(), "-I", "OUTPUT", "-p", "tcp", "-j", "ACCEPT"}, "before ours", []string{"-t", b.table(), "-D", "OUTPUT", "-p", "tcp", "-j", "ACCEPT"}},
			{"a rule of somebody in a chain of ours", []string{"-t", b.table(), "-I", "PILLION_IN", "-j", "ACCEPT"}, "rules", nil},
		} {
			for _, v6 := range []bool{false, true} {
				t.Run(b.tool(v6)+"/"+tt.name, func(t *testing.T) {
					p.filter(append([]string{b.tool(v6)}, tt.do...)...)
					r := run(t, p.pillion("status"))
					if r.code != config.ExitFailure || !strings.Contains(r.stdout, "NOT EFFECTIVE") || !strings.Contains(r.stdout, tt.says) {
						t.Errorf("status: exit code %d, want 1 and %q:\n%s", r.code, tt.says, r.stdout)
					}
					p.init()
					must(t, "status after init", run(t, p.pillion("status")))
					if tt.undo != nil {
						p.filter(append([]string{b.tool(v6)}, tt.undo...)...)
					}
					wantState(t, "after init", once, p.hostState())
				})
			}
		}
		must(t, "clean", p.clean())
		wantState(t, "after clean", before, p.hostState())
	})
}

// TestInitStoppedAfterEachChange: an init that fails takes back whatever it has done so far; one that dies there leaves what
// clean takes away. Of the backends that are alike, one fails where the other dies.
func TestInitStoppedAfterEachChange(t *testing.T) {
	for turn, b := range backends {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			p := newPodBy(t, b)
			before := p.hostState()
			r := run(t, p.initCmd("-o", "json"))
			must(t, "init", r)
			var whole struct{ Changed []string }
			if err := json.Unmarshal([]byte(r.stdout), &whole); err != nil {
				t.Fatal(err)
			}
			must(t, "clean", p.clean())
			stopped := func(how string, change int) result {
				cmd := p.initCmd("--no-verify")
				if cmd.Env == nil {
					cmd.Env = os.Environ()
				}
				cmd.Env = append(cmd.Env, fmt.Sprintf("PILLION_TEST_INTERRUPT=%s:%d", how, change))
				return run(t, cmd)
			}
			for i, what := range whole.Changed {
				both, fails := b.name == "ebpf", (i+turn)%2 == 0
				if both || fails {
					if r := stopped("fail", i+1); r.code == 0 || !strings.Contains(r.stderr, "interrupted by a test") {
						t.Fatalf("init was to fail, and ended with %d: %s", r.code, r.stderr)
					}
					wantState(t, "after init failed behind "+what, before, p.hostState())
				}
				if both || !fails {
					if r := stopped("kill", i+1); r.code != 128+int(syscall.SIGKILL) {
						t.Fatalf("init was to be killed, and ended with %d: %s", r.code, r.stderr)
					}
					must(t, "clean", p.clean())
					wantState(t, "after clean of what init left that died behind "+what, before, p.hostState())
				}
				if t.Failed() {
					t.FailNow()
				}
			}
			t.Logf("%d changes", len(whole.Changed))
			if r := stopped("fail", len(whole.Changed)+1); r.code != 0 {
				t.Errorf("there are more changes than init said: %s", r.stderr)
			}
		})
	}
}

// TestFilterInitKilled: SIGKILL at any moment leaves what the next init makes whole, and clean takes away.
func TestFilterInitKilled(t *testing.T) {
	byFilter(t, func(t *testing.T, b backend) {
		p := newPodBy(t, b)
		before := p.hostState()
		start := time.Now()
		p.init()
		whole := time.Since(start)
		must(t, "clean", p.clean())
		killed := 0
		const times = 8
		for i := range times {
			cmd := p.initCmd("--no-verify")
			if i%2 == 0 {
				cmd = p.initCmd()
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			select {
			case <-cmd.Done():
			case <-time.After(whole*time.Duration(i)/times + rand.N(whole/times)):
			}
			cmd.Kill()
			if cmd.ExitCode() == 128+int(syscall.SIGKILL) {
				killed++
			}
			if i%4 < 2 { // on what is left, or from what init makes of it
				p.init()
				must(t, "status", run(t, p.pillion("status")))
			} else if r := p.clean(); r.code != 0 && !strings.Contains(r.stderr, "nothing of pillion is installed") {
				t.Fatalf("clean: %s", r.stderr)
			}
			if r := p.clean(); r.code != 0 && !strings.Contains(r.stderr, "nothing of pillion is installed") {
				t.Fatalf("clean: %s", r.stderr)
			}
			wantState(t, "after clean", before, p.hostState())
			if t.Failed() {
				t.Fatalf("in round %d", i)
			}
		}
		t.Logf("init takes %s; %d of %d inits were killed before their end", whole, killed, times)
	})
}

// TestReapplyUnderLoad: another policy takes the place of the present one, fifty times, by packet filters in all, while
// connections are made all the time: none fails, and none that both policies capture passes by.
func TestReapplyUnderLoad(t *testing.T) {
	for _, b := range backends {
		times := 50
		if b.name != "ebpf" {
			times /= len(filterBackends)
		}
		t.Run(b.name, func(t *testing.T) {
			t.Parallel()
			p := newPodBy(t, b)
			p.asRoot = true // replacing takes the right to detach
			p.init()
			p.startProxyOf(b)
			var stop atomic.Bool
			var load sync.WaitGroup
			var made, both atomic.Int64
			for i, w := range p.paths() {
				saw := make(chan seen, 1)
				always := w.start(echo(saw))
				w.port = uint16(8000 + i) // which every other policy excludes
				sometimesSaw := make(chan seen, 1)
				sometimes := w.start(echo(sometimesSaw))
				for _, to := range []struct {
					name     string
					captured bool
					once     func() (peer seen, c *testnet.Conn, err error)
				}{
					{"always", true, func() (seen, *testnet.Conn, error) { return onceThrough(w, always, saw) }},
					{"sometimes", false, func() (seen, *testnet.Conn, error) { return onceThrough(w, sometimes, sometimesSaw) }},
				} {
					load.Go(func() {
						for !stop.Load() {
							far, c, err := to.once()
							made.Add(1)
							time.Sleep(100 * time.Millisecond) // a hundred of all each second leave init time
							switch {
							case err != nil:
								t.Errorf("%s/%s: %v", w.name, to.name, err)
								return
							case to.captured && far.peer == unmap(c.Own):
								t.Errorf("%s/%s: passed by", w.name, to.name)
								return
							case far.peer == unmap(c.Own):
								both.Add(1)
							}
						}
					})
				}
			}
			for i := range times {
				if i%2 == 0 {
					p.init("--no-verify", "--exclude-outbound-ports=8000-8005", "--exclude-inbound-ports=8000-8005")
				} else {
					p.init("--no-verify")
				}
				if t.Failed() {
					break
				}
			}
			stop.Store(true)
			load.Wait()
			t.Logf("%d connections, %d of them passed by as they should", made.Load(), both.Load())
			if both.Load() == 0 || both.Load() == made.Load() {
				t.Error("the policies made no difference: this test shows nothing")
			}
		})
	}
}

// onceThrough makes one connection, with an exchange, and tells whom its server saw.
func onceThrough(w path, to netip.AddrPort, saw <-chan seen) (far seen, c *testnet.Conn, err error) {
	c, err = w.dial(to)
	if err != nil {
		return far, nil, err
	}
	defer c.Close()
	if err := exchange(c, "under load"); err != nil {
		return far, c, err
	}
	return <-saw, c, finish(c.TCPConn)
}

// TestFilterPoorHosts: what a host lacks is a clear outcome, and never half a capture.
func TestFilterPoorHosts(t *testing.T) {
	hide := []string{"--mount", "--propagation", "private", "/bin/sh", "-c"}
	within := func(p *pod, prepare string, args ...string) *testnet.Cmd {
		argv := append(append(hide, prepare+` && exec "$@"`, "sh", pillionPath), args...)
		return p.ns.Command(nil, "unshare", argv...)
	}
	byFilter(t, func(t *testing.T, b backend) {
		initArgs := append([]string{"init"}, b.args...)
		t.Run("IPv6 is off", func(t *testing.T) {
			p := newPodBy(t, b)
			p.ns.Sysctl("net.ipv6.conf.all.disable_ipv6", "1")
			p.init()
			p.proxy = p.proxyCmd(inside, "--health=127.0.0.1:16020")
			if b.redirects() {
				p.proxy.User.Caps = []uintptr{}
			}
			if err := p.proxy.Start(); err != nil {
				t.Fatal(err)
			}
			testnet.Wait(t, "the proxy is ready", func() bool { return strings.Contains(p.proxy.log.String(), "ready: ") })
			for _, w := range []path{p.paths()[0], p.paths()[3]} {
				p.through(t, w)
			}
			must(t, "status", run(t, p.pillion("status")))
			must(t, "clean", p.clean())
		})
		t.Run("no iptables", func(t *testing.T) {
			p := newPodBy(t, b)
			before := p.hostState()
			wantFault(t, run(t, within(p, "mount -t tmpfs none /usr/sbin", initArgs...)), config.ExitUnavailable, "would pass uncaptured", "install iptables")
			wantState(t, "afterwards", before, p.hostState())
		})
		t.Run("no ip6tables", func(t *testing.T) {
			p := newPodBy(t, b)
			before := p.hostState()
			multi := "xtables-nft-multi"
			if strings.HasSuffix(b.name, "legacy") {
				multi = "xtables-legacy-multi"
			}
			only4 := `mkdir /tmp/sbin.$$ && cp /usr/sbin/` + multi + ` /tmp/sbin.$$ && mount --bind /tmp/sbin.$$ /usr/sbin && mount -t tmpfs none /tmp/sbin.$$ && rmdir /tmp/sbin.$$ 2>/dev/null; ` +
				`cd /usr/sbin && for n in iptables iptables-save iptables-restore; do ln -s ` + multi + ` $n; done; cd /`
			r := run(t, within(p, only4, initArgs...))
			wantFault(t, r, config.ExitUnavailable, "IPv6 would pass uncaptured", "disable_ipv6")
			wantState(t, "afterwards", before, p.hostState())
		})
		t.Run("no CAP_NET_ADMIN", func(t *testing.T) {
			p := newPodBy(t, b)
			before := p.hostState()
			cmd := p.initCmd()
			cmd.User = &testnet.User{Caps: []uintptr{unix.CAP_BPF, unix.CAP_NET_RAW}, NoNewPrivs: true}
			wantFault(t, run(t, cmd), config.ExitNoPerm, "CAP_NET_ADMIN")
			wantState(t, "afterwards", before, p.hostState())
		})
		t.Run("read-only sysctls", func(t *testing.T) {
			p := newPodBy(t, b)
			before := p.hostState()
			r := run(t, p.ns.Command(nil, "unshare", append(append(readOnlySysctls, pillionPath), initArgs...)...))
			if b.redirects() { // needs none of them
				must(t, "init", r)
				must(t, "clean", p.clean())
			} else {
				wantFault(t, r, config.ExitUnavailable, "kernel parameters", "securityContext")
			}
			wantState(t, "afterwards", before, p.hostState())
		})
	})
}

// TestAutoBackend: the first backend that the host allows is taken, and what was against the others is said.
func TestAutoBackend(t *testing.T) {
	t.Run("ebpf", func(t *testing.T) {
		t.Parallel()
		p := newPod(t)
		r := run(t, p.initCmd("--backend=auto"))
		must(t, "init", r)
		if !strings.Contains(r.stdout, "backend ebpf") || strings.Contains(r.stdout, "# not by") {
			t.Errorf("init says:\n%s", r.stdout)
		}
	})
	// Without CAP_BPF, in a network namespace of its own.
	less := func(p *pod, args ...string) *testnet.Cmd {
		const prepare = `mount -t sysfs none /sys && exec setpriv --bounding-set=-all,+net_admin,+net_raw "$@"`
		return p.ns.Command(nil, "unshare", append([]string{"--mount", "--propagation", "private", "/bin/sh", "-c", prepare, "sh", pillionPath}, args...)...)
	}
	t.Run("tproxy", func(t *testing.T) {
		t.Parallel()
		p := newPodBy(t, filterBackends[0])
		r := run(t, less(p, "init"))
		must(t, "init", r)
		if !strings.Contains(r.stdout, "backend tproxy") || !strings.Contains(r.stdout, "# not by ebpf: missing CAP_BPF") {
			t.Errorf("init says:\n%s", r.stdout)
		}
		p.startProxyOf(p.by)
		for _, w := range p.paths() {
			p.captured(t, w)
		}
		wantFault(t, run(t, p.pillion("init", "--cgroup", p.cg.Path)), config.ExitFailure, "captured already by another backend", "pillion clean")
		must(t, "clean", p.clean())
	})
	t.Run("redirect", func(t *testing.T) {
		t.Parallel()
		p := newPodBy(t, filterBackends[2])
		r := run(t, less(p, "init", "--on-proxy-down=closed"))
		must(t, "init", r)
		if !strings.Contains(r.stdout, "backend redirect") || !strings.Contains(r.stdout, "# not by tproxy: ") {
			t.Errorf("init says:\n%s", r.stdout)
		}
		p.startProxyOf(p.by)
		for _, w := range p.paths() {
			p.through(t, w)
		}
	})
	t.Run("not the host unasked", func(t *testing.T) {
		t.Parallel()
		cmd := testnet.New(t).Command(pillionPath, "init", "--dry-run")                                      // in the namespace of the host and its first process
		cmd.User = &testnet.User{Caps: []uintptr{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW, unix.CAP_SYS_PTRACE}} // may see where that one is
		r := run(t, cmd)
		if r.code == 0 || !strings.Contains(r.stderr, "not done unasked") {
			t.Errorf("exit code %d, standard error:\n%s", r.code, r.stderr)
		}
	})
	t.Run("none", func(t *testing.T) {
		t.Parallel()
		p := newPodBy(t, filterBackends[0])
		before := p.hostState()
		wantFault(t, run(t, less(p, "init", "--on-proxy-down=open")), config.ExitNoPerm, "no backend can capture here", "ebpf: missing CAP_BPF", "tproxy: ", "redirect: ", "pillion check")
		wantState(t, "afterwards", before, p.hostState())
	})
}
