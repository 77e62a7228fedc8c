// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/test/testnet"
	"golang.org/x/sys/unix"
)

// What an agent does for the tests of ports and sockets that come back: see testnet.Op.
var connectsOp = testnet.NewOp("connects", connects)

// ending says how a connection ends.
type ending string

const (
	serverFirst  ending = "server closes first" // whose end of it is the one that stays in TIME_WAIT
	clientFirst  ending = "client closes first"
	clientResets ending = "client resets"
	staysOpen    ending = "stays open" // until all have been made
)

// connectsArgs asks for connections to a server that answers as sayPeer does.
type connectsArgs struct {
	To      netip.AddrPort
	Mapped  bool           // from an IPv6 socket to an IPv4 address
	From    netip.AddrPort // bound to with SO_REUSEADDR; zero: the kernel chooses
	Count   int
	Workers int              // how many at a time; 0: one
	Ports   config.PortRange // of the proxy
	Ending  ending
}

// connectsResult says what became of them.
type connectsResult struct {
	Through int            // the server saw a port of the proxy's
	Past    int            // it saw the client's very own
	Errors  map[string]int // by errno
}

// want fails the test unless all of n connections went through the proxy, but for the given errors.
func (r connectsResult) want(t *testing.T, through int, errs map[string]int) {
	t.Helper()
	wrong := r.Through != through || r.Past != 0 || len(r.Errors) != len(errs)
	for text, n := range errs {
		wrong = wrong || r.Errors[text] != n
	}
	if wrong {
		t.Errorf("%+v; want %d through the proxy, none past it, errors %v", r, through, errs)
	}
}

// sayPeer takes one byte and says whom it sees at the other end.
func sayPeer(e ending) func(*net.TCPConn) {
	return func(c *net.TCPConn) {
		if readExactly(c, "x") != nil {
			return
		}
		fmt.Fprintln(c, unmap(addrPort(c.RemoteAddr())))
		if e != serverFirst {
			_, _ = io.Copy(io.Discard, c)
		}
	}
}

// connects runs in the agent. A connect that hangs is for the test to see, by the socket.
func connects(a connectsArgs) (connectsResult, error) {
	r := connectsResult{Errors: map[string]int{}}
	var mu sync.Mutex
	var open []int
	var wg sync.WaitGroup
	for worker := range max(a.Workers, 1) {
		wg.Go(func() {
			for i := worker; i < a.Count; i += max(a.Workers, 1) {
				fd, own, saw, err := a.one()
				mu.Lock()
				switch {
				case err != nil:
					errno := syscall.Errno(0)
					if errors.As(err, &errno) {
						err = errno
					}
					r.Errors[err.Error()]++
				case saw == own:
					r.Past++
				case a.Ports.Contains(saw.Port()):
					r.Through++
				default:
					r.Errors[fmt.Sprintf("the server saw %s", saw)]++
				}
				if err == nil && a.Ending == staysOpen {
					open = append(open, fd)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	for _, fd := range open {
		unix.Close(fd)
	}
	return r, nil
}

// one makes one connection, in plain system calls: Go's own dialler would try other ports by itself.
func (a connectsArgs) one() (fd int, own, saw netip.AddrPort, err error) {
	for range 10_000 { // until the kernel has let go of the connection before this one: its last ACK is on its way
		if fd, err = a.connect(); a.From == (netip.AddrPort{}) || !errors.Is(err, unix.EADDRNOTAVAIL) {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if err != nil {
		return 0, own, saw, err
	}
	own, saw, err = askPeer(fd)
	if err == nil && a.Ending == serverFirst {
		if n, rerr := unix.Read(fd, make([]byte, 1)); n != 0 || rerr != nil {
			err = fmt.Errorf("in place of the end: %d, %w", n, rerr)
		}
	}
	if err != nil || a.Ending == clientResets {
		_ = unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	}
	if err != nil || a.Ending != staysOpen {
		unix.Close(fd)
	}
	return fd, own, saw, err
}

func (a connectsArgs) connect() (int, error) {
	fd, err := newSocket(a.To.Addr().Is6() || a.Mapped)
	if err != nil {
		return 0, err
	}
	if a.From != (netip.AddrPort{}) {
		err = errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
			unix.Bind(fd, sockaddrOf(a.From, a.Mapped)),
		)
	}
	if err == nil {
		err = unix.Connect(fd, sockaddrOf(a.To, a.Mapped))
	}
	if err != nil {
		unix.Close(fd)
		return 0, err
	}
	return fd, nil
}

// askPeer asks a server that answers as sayPeer does, over a connected socket.
func askPeer(fd int) (own, saw netip.AddrPort, err error) {
	if own, err = ownName(fd); err != nil {
		return own, saw, err
	}
	if _, err := unix.Write(fd, []byte("x")); err != nil {
		return own, saw, err
	}
	var line []byte
	for b := make([]byte, 1); ; line = append(line, b...) {
		n, err := unix.Read(fd, b)
		if n == 0 && err == nil {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return own, saw, err
		}
		if b[0] == '\n' {
			break
		}
	}
	saw, err = netip.ParseAddrPort(string(line))
	return own, saw, err
}

func newSocket(v6 bool) (int, error) {
	family := unix.AF_INET
	if v6 {
		family = unix.AF_INET6
	}
	return unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
}

func sockaddrOf(a netip.AddrPort, mapped bool) unix.Sockaddr {
	if a.Addr().Is6() || mapped {
		return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
	}
	return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
}

func ownName(fd int) (netip.AddrPort, error) {
	sa, err := unix.Getsockname(fd)
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)), err
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port)), err
	}
	return netip.AddrPort{}, err
}

// client is who connects on a path: the app, or an agent of the world.
func (p *pod) client(w path, world *testnet.Agent) *testnet.Agent {
	if w.direction == "inbound" {
		return world
	}
	return p.app
}

// connecting is a call of connects that is under way.
type connecting struct {
	w    path
	args connectsArgs
	done chan string // receives what it returned, should it return
}

func (w path) connecting(by *testnet.Agent, a connectsArgs) connecting {
	c := connecting{w, a, make(chan string, 1)}
	go func() {
		r, err := connectsOp.Call(by, a)
		c.done <- fmt.Sprintf("%+v, %v", r, err)
	}()
	return c
}

// wantHang waits until each of them has sent a SYN and repeated it three times.
func wantHang(t *testing.T, all ...connecting) {
	t.Helper()
	for _, how := range hangOrEnd(t, all...) {
		t.Errorf("no hang: %s", how)
	}
}

// hangOrEnd waits until each of them has either repeated its SYN three times, or ended: it returns how those did.
func hangOrEnd(t *testing.T, all ...connecting) (ended []string) {
	t.Helper()
	settled := map[int]bool{}
	testnet.Wait(t, "SYNs are repeated, and again, and again", func() bool {
		sockets := map[*testnet.Namespace][]testnet.Socket{}
		for i, c := range all {
			if settled[i] {
				continue
			}
			select {
			case how := <-c.done:
				settled[i] = true
				ended = append(ended, c.w.name+": "+how)
				continue
			default:
			}
			if _, ok := sockets[c.w.clientNS]; !ok {
				sockets[c.w.clientNS] = c.w.clientNS.Sockets()
			}
			for _, s := range sockets[c.w.clientNS] {
				if s.State == testnet.SynSent && unmap(s.Remote) == c.args.To && s.Retransmits >= 3 {
					settled[i] = true
					t.Logf("%s: the connect from %s hangs", c.w.name, s.Local)
				}
			}
		}
		if len(settled) < len(all) {
			time.Sleep(50 * time.Millisecond)
		}
		return len(settled) == len(all)
	})
	return ended
}

// counters reads the verdicts that the capture has counted.
func (p *pod) counters(t *testing.T) map[string]uint64 {
	t.Helper()
	r := run(t, p.pillion("status", "--cgroup", p.cg.Path, "-o", "json"))
	var reports []struct {
		Counters map[string]uint64 `json:"counters"`
	}
	if err := json.Unmarshal([]byte(r.stdout), &reports); err != nil || len(reports) != 1 || reports[0].Counters == nil {
		t.Fatalf("status: %v\n%s%s", err, r.stdout, r.stderr)
	}
	return reports[0].Counters
}
