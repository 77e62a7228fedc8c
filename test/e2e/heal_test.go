// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/test/testnet"
	"golang.org/x/sys/unix"
)

// flap takes the pod's NIC down and up again, and gives it back what the kernel took: its IPv6 address and the routes.
func (p *pod) flap() {
	p.ns.Down("eth0")
	p.ns.Up("eth0")
	p.ns.Addr("eth0", pod6+"/64")
	p.ns.DefaultRoute(client4, client6)
}

// removeAllRules removes the rules of every slot.
func (p *pod) removeAllRules() {
	p.t.Helper()
	first, last := config.Slot(0).RulePriority(), config.Slot(config.Slots-1).RulePriority()+9
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := p.ns.Netlink().RuleList(family)
		if err != nil {
			p.t.Fatal(err)
		}
		for _, r := range rules {
			if r.Priority < first || r.Priority > last {
				continue
			}
			r.Family, r.Table = family, max(r.Table, 0)
			if err := p.ns.Netlink().RuleDel(&r); err != nil {
				p.t.Fatalf("remove %s: %v", r, err)
			}
		}
	}
}

// TestRunMends: what lives on follows the network namespace and puts back what others take, and takes in what comes. Row 27.
func TestRunMends(t *testing.T) {
	t.Parallel()
	s := newSession(t)
	before := s.snapshot()
	w := s.paths()[0]
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	defer write.Close()
	saw := make(chan seen, 1)
	out := &testnet.Lines{}
	cmd := s.command([]string{"--report", "table"}, "echo ready; read x; "+client(w.start(echo(saw)))+"; exit 9")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = read, out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	out.Wait(t, "the command is ready", func(l string) bool { return l == "ready" })

	whole := func(what string) {
		t.Helper()
		testnet.Wait(t, "the capture is whole again after "+what, func() bool { return len(s.wrong()) == 0 })
	}
	whole("its start")
	s.removeAllRules()
	whole("the loss of its rules")
	s.flap()
	whole("a flap of the NIC")
	s.ns.NoAddr("eth0", second4+"/24")
	s.ns.Addr("eth0", "10.77.0.9/24")
	whole("an address that was replaced")
	s.addNIC()
	whole("a NIC that came")
	testnet.Wait(t, "the new NIC has both filters", func() bool {
		return s.tcx("eth1", ebpf.AttachTCXIngress)+s.tcx("eth1", ebpf.AttachTCXEgress) == 2
	})
	if _, err := write.WriteString("go\n"); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); cmd.ExitCode() != 9 {
		t.Fatalf("exit code %d, want 9 (%v)\n%s", cmd.ExitCode(), err, out)
	}
	if server := <-saw; !w.ports.Contains(server.peer.Port()) {
		t.Errorf("the server's peer is %s, want a port of %s", server.peer, w.ports)
	}
	after := s.snapshot()
	same(t, "rules after run", testnet.Snapshot{Rules: before.Rules}, testnet.Snapshot{Rules: after.Rules})
	same(t, "sysctls after run", testnet.Snapshot{Sysctls: before.Sysctls}, testnet.Snapshot{Sysctls: after.Sysctls})
}

// tcx counts the tcx programs on one side of a device; one where the kernel has no tcx and clsact is what there is.
func (p *pod) tcx(device string, side ebpf.AttachType) (n int) {
	p.ns.Do(func() {
		r, err := link.QueryPrograms(link.QueryOptions{Target: p.ns.Index(device), Attach: side})
		if err != nil {
			n = 1
			return
		}
		n = len(r.Programs)
	})
	return n
}

// TestStatusNamesWhatIsLost: what has exited cannot mend: status names each part and fails, and init mends. Row 27.
func TestStatusNamesWhatIsLost(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		lose  func(p *pod)
		names []string
	}{
		{"a NIC flaps", (*pod).flap, []string{"route IPv6 table 166 eth0"}},
		{"a NIC comes", (*pod).addNIC, []string{"filter eth1 ingress", "filter eth1 egress", "route IPv4 table 166 eth1", "route IPv6 table 166 eth1"}},
		{"the rules go", (*pod).removeAllRules, []string{"rule IPv4 60", "rule IPv6 66"}},
		{"the clsact of the NIC goes", func(p *pod) { p.ns.NoClsact("eth0") }, []string{"filter eth0 ingress", "filter eth0 egress"}},
		{"a sysctl is changed", func(p *pod) { p.ns.Sysctl("net.ipv4.fwmark_reflect", "0") }, []string{"sysctl net.ipv4.fwmark_reflect"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t)
			install := func() { must(t, "init", run(t, p.pillion("init", "--cgroup", p.cg.Path))) } // as root: mending may take all
			install()
			if wrong := p.wrong(); len(wrong) > 0 {
				t.Fatalf("wrong from the start: %v", wrong)
			}
			tt.lose(p)
			testnet.Wait(t, "status names all that is lost", func() bool {
				wrong := p.wrong()
				return !slices.ContainsFunc(tt.names, func(n string) bool { return !slices.Contains(wrong, n) })
			})
			if _, r := p.reports(); r.code == 0 {
				t.Error("status ends with 0")
			}
			install()
			if wrong := p.wrong(); len(wrong) > 0 {
				t.Errorf("after init again: %v", wrong)
			}
			p.startProxy(outside)
			for _, w := range p.paths() {
				p.captured(t, w)
			}
		})
	}
}

// TestPacketSockets: a packet socket for IP makes the kernel lose the sockets that tc assigns; status says so and fails. One
// for all protocols does no harm. Row 31.
func TestPacketSockets(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.init()
	open := func(protocol uint16) (fd int) {
		p.ns.Do(func() {
			big := protocol<<8 | protocol>>8
			var err error
			if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err == nil {
				err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: big, Ifindex: p.ns.Index("eth0")})
			}
			if err != nil {
				t.Error(err)
			}
		})
		return fd
	}
	all := open(unix.ETH_P_ALL)
	defer unix.Close(all)
	if wrong := p.wrong(); len(wrong) > 0 {
		t.Errorf("with a packet socket for all protocols: %v", wrong)
	}
	for _, protocol := range []uint16{unix.ETH_P_IP, unix.ETH_P_IPV6} {
		fd := open(protocol)
		reports, r := p.reports()
		if r.code == 0 || !slices.ContainsFunc(reports[0].Items, func(i redirect.Item) bool { return i.Kind == "packet" && i.Name == "eth0" }) {
			t.Errorf("protocol %#x: exit code %d, %+v", protocol, r.code, reports)
		}
		unix.Close(fd)
	}
	if wrong := p.wrong(); len(wrong) > 0 {
		t.Errorf("without them: %v", wrong)
	}
}

// TestTwoSlotsAreCleanedInEitherOrder: captures side by side give back what was there before when the last of them goes.
// Row 29.
func TestTwoSlotsAreCleanedInEitherOrder(t *testing.T) {
	t.Parallel()
	for name, order := range map[string][]int{"first in, first out": {0, 1}, "last in, first out": {1, 0}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPod(t)
			before := p.snapshot()
			cgroups := []*testnet.Cgroup{p.appCG, p.net.Cgroup("other")}
			for i, cg := range cgroups {
				args := []string{"init", "--cgroup", cg.Path, "--slot", []string{"0", "3"}[i]}
				if i == 1 {
					args = append(args, "--outbound-port", "17001", "--inbound-port", "17006", "--inbound-own-port", "17007")
				}
				must(t, strings.Join(args, " "), run(t, p.pillion(args...)))
			}
			if reports, _ := p.reports(); len(reports) != 2 || len(p.wrong()) > 0 {
				t.Errorf("%d captures, wrong: %v; want two, whole", len(reports), p.wrong())
			}
			for n, i := range order {
				must(t, "clean", run(t, p.pillion("clean", "--cgroup", cgroups[i].Path)))
				if reports, _ := p.reports(); n == 0 && (len(reports) != 1 || len(p.wrong()) > 0) {
					t.Errorf("after the first clean: %d captures, wrong: %v; want one, whole", len(reports), p.wrong())
				}
			}
			same(t, "after both", before, p.snapshot())
		})
	}
}
