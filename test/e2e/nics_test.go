// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"unsafe"

	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/test/testnet"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The addresses of a second link between pod and world, whose ends are eth1 and v1. Its default routes come after those
// of eth0.
const (
	other4, other6   = "10.78.0.2", "fd78::2"
	beyond4, beyond6 = "10.78.0.1", "fd78::1"
)

// addNIC gives the pod its second link.
func (p *pod) addNIC() {
	p.t.Helper()
	testnet.Link(p.ns, "eth1", p.ext, "v1")
	p.ns.Addr("eth1", other4+"/24", other6+"/64")
	p.ext.Addr("v1", beyond4+"/24", beyond6+"/64")
	for _, gw := range []string{beyond4, beyond6} {
		p.route(p.ns, &netlink.Route{Gw: net.ParseIP(gw), Priority: 5000})
	}
	for _, ns := range []*testnet.Namespace{p.ns, p.ext} {
		ns.Sysctl("net.ipv4.conf.all.rp_filter", "0")
		for _, device := range []string{"eth0", "eth1", "v0", "v1"} {
			if key := "net.ipv4.conf." + device + ".rp_filter"; ns.SysctlValue(key) != "absent" {
				ns.Sysctl(key, "0")
			}
		}
	}
}

func (p *pod) route(ns *testnet.Namespace, r *netlink.Route) {
	p.t.Helper()
	if err := ns.Netlink().RouteAdd(r); err != nil {
		p.t.Fatalf("route %s in %s: %v", r, ns.Name, err)
	}
}

// markRoute routes what carries the mark by the second link, as a host's administrator does: without a mask, so that the
// mark must be this very one.
func (p *pod) markRoute(mark uint32, table int) {
	p.t.Helper()
	for family, gw := range map[int]string{unix.AF_INET: beyond4, unix.AF_INET6: beyond6} {
		p.route(p.ns, &netlink.Route{Gw: net.ParseIP(gw), Table: table})
		rule := netlink.NewRule()
		rule.Family, rule.Mark, rule.Table, rule.Priority = family, mark, table, 1000
		if err := p.ns.Netlink().RuleAdd(rule); err != nil {
			p.t.Fatalf("rule for mark %d: %v", mark, err)
		}
	}
}

// initWithout installs the capture with cures taken out: see cmd/pillion/testing.go. It is not proven, since it may be wrong.
func (p *pod) initWithout(cures string, args ...string) {
	p.t.Helper()
	cmd := p.initCmd(append([]string{"--no-verify"}, args...)...)
	cmd.Env = append(os.Environ(), "PILLION_TEST_WITHOUT="+cures)
	must(p.t, "init without "+cures, run(p.t, cmd))
}

// newUncured makes a pod whose capture lacks cures, with a proxy that is ready, and soon gives up what it cannot dial.
func newUncured(t *testing.T, cures string, prepare func(*pod)) *pod {
	t.Helper()
	p := newPod(t)
	if prepare != nil {
		prepare(p)
	}
	p.initWithout(cures)
	p.startProxy(inside, "--connect-timeout", "2s")
	return p
}

// by is the path with the app's way to connect replaced.
func (w path) by(a *testnet.Agent, d testnet.Dial) path {
	w.dial = func(to netip.AddrPort) (*testnet.Conn, error) {
		d := d
		d.To, d.Mapped = to.String(), w.name == "out/mapped"
		return a.Dial(d)
	}
	return w
}

// onNIC is the path with a server that tells by which device of the world each connection came.
func (p *pod) onNIC(w path) (path, <-chan string) {
	devices := make(chan string, 10)
	w.serve = func(network, addr string, handler func(*net.TCPConn)) *testnet.Server {
		ln := p.ext.Listen(network, addr)
		keepDevice(p.t, ln)
		return testnet.Serve(p.t, ln, func(c *net.TCPConn) {
			devices <- p.nameOf(p.ext, deviceOf(c))
			handler(c)
		})
	}
	return w, devices
}

func (p *pod) nameOf(ns *testnet.Namespace, index int) string {
	link, err := ns.Netlink().LinkByIndex(index)
	if err != nil {
		return fmt.Sprintf("device %d: %v", index, err)
	}
	return link.Attrs().Name
}

// keepDevice makes the kernel note in each accepted connection by which device it came.
func keepDevice(t testing.TB, ln *net.TCPListener) {
	t.Helper()
	raw, err := ln.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) {
		if domain, derr := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_DOMAIN); derr == nil && domain == unix.AF_INET6 {
			err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_2292PKTINFO, 1)
			return
		}
		err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_PKTINFO, 1)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// deviceOf is the index of the device by which an accepted connection came, 0 if the kernel does not say.
func deviceOf(c *net.TCPConn) (index int) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0
	}
	const ipPktOptions = 9 // of linux/in.h
	level, option, at := unix.SOL_IP, ipPktOptions, 0
	if addrPort(c.LocalAddr()).Addr().Is6() && !addrPort(c.LocalAddr()).Addr().Is4In6() {
		level, option, at = unix.SOL_IPV6, unix.IPV6_2292PKTOPTIONS, 16
	}
	_ = raw.Control(func(fd uintptr) {
		buf, size := make([]byte, 256), uint32(256)
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, uintptr(level), uintptr(option),
			uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&size)), 0)
		messages, err := unix.ParseSocketControlMessage(buf[:size])
		if errno != 0 || err != nil || len(messages) == 0 || len(messages[0].Data) < at+4 {
			return
		}
		index = int(*(*int32)(unsafe.Pointer(&messages[0].Data[at])))
	})
	return index
}

// reports is what `pillion status` says of the pod, and how it ended.
func (p *pod) reports(args ...string) ([]redirect.Report, result) {
	p.t.Helper()
	r := run(p.t, p.pillion(append([]string{"status", "-o", "json"}, args...)...))
	var reports []redirect.Report
	if err := json.Unmarshal([]byte(r.stdout), &reports); err != nil && r.stdout != "" {
		p.t.Fatalf("status: %v\n%s%s", err, r.stdout, r.stderr)
	}
	return reports, r
}

// wrong lists what status finds missing or wrong, as "kind name".
func (p *pod) wrong() []string {
	p.t.Helper()
	reports, r := p.reports()
	var parts []string
	for _, report := range reports {
		for _, i := range report.Items {
			if i.State != redirect.StateOK && i.Kind != "proxy" {
				parts = append(parts, i.Kind+" "+i.Name)
			}
		}
	}
	if (r.code != 0) != (len(parts) > 0) {
		p.t.Errorf("status ended with %d, and what is not ok is %q", r.code, parts)
	}
	return parts
}

// repeats reports whether a SYN of the path to the address was sent a third time, because nobody answered.
func (p *pod) repeats(w path, to netip.AddrPort) bool {
	for _, s := range w.clientNS.Sockets() {
		if s.State == testnet.SynSent && unmap(s.Remote) == to && s.Retransmits > 1 {
			return true
		}
	}
	return false
}

// hangs checks that a connect over the path gets no answer.
func (p *pod) hangs(t *testing.T, w path) {
	t.Helper()
	a := p.attempt(w)
	testnet.Wait(t, w.name+": the SYN is repeated", func() bool {
		select {
		case <-a.done:
			t.Fatalf("%s: the connect has ended (%v), want it without an answer", w.name, a.err)
		default:
		}
		return p.repeats(w, a.to)
	})
}

// neverDirect is how a connect goes that must not be direct: captured, an error, or held without an answer. It fails the
// test if the server sees the client itself.
func (p *pod) neverDirect(t *testing.T, a *attempt) (outcome string) {
	t.Helper()
	testnet.Wait(t, a.w.name+": the connect ends, or its SYN is repeated", func() bool {
		select {
		case <-a.done:
			return true
		default:
			return p.repeats(a.w, a.to)
		}
	})
	select {
	case <-a.done:
	default:
		return "held"
	}
	if a.err != nil {
		return a.err.Error()
	}
	defer a.c.Close()
	if server := <-a.saw; server.peer == unmap(a.c.Own) {
		t.Errorf("%s: connected directly, from %s", a.w.name, a.c.Own)
		return "direct"
	}
	return "captured"
}

// goesDirect reports whether a connect over the path reaches the server without the proxy: the hazard that most cures
// are for.
func (p *pod) goesDirect(t *testing.T, w path) bool {
	t.Helper()
	saw := make(chan seen, 1)
	server, to := w.server(echo(saw))
	defer server.Close()
	c, err := w.dial(to)
	if err != nil {
		t.Logf("%s: %v", w.name, err)
		return false
	}
	defer c.Close()
	return (<-saw).peer == unmap(c.Own)
}

// family is that of the packets on the path.
func (w path) family() redirect.Family {
	if w.from.Is6() {
		return redirect.IPv6
	}
	return redirect.IPv4
}

// pick is the one of two that fits the family of the path.
func pick[T any](w path, v4, v6 T) T {
	if w.family() == redirect.IPv6 {
		return v6
	}
	return v4
}

// outs are the outbound paths, ins the inbound ones.
func (p *pod) outs() []path { return p.paths()[:3] }
func (p *pod) ins() []path  { return p.paths()[3:] }

func parseAddr(s string) net.IP { return net.ParseIP(s) }

func cidr(t testing.TB, s string) *net.IPNet {
	t.Helper()
	_, n, err := net.ParseCIDR(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
