// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/test/testnet"
)

// What an agent does that is to be killed: see testnet.Op.
var (
	downloadOp = testnet.NewOp("download", download)
	uploadOp   = testnet.NewOp("upload", upload)
)

// TestServerThatNeverEnds: the client is gone for good, its server has not ended its stream, so that the proxy's end is
// open to it; then the client's port comes back. Row 2.
func TestServerThatNeverEnds(t *testing.T) {
	t.Parallel()
	prepare := func(t *testing.T, without string) *pod {
		p := newPod(t)
		for _, ns := range []*testnet.Namespace{p.ns, p.ext} {
			ns.Sysctl("net.ipv4.tcp_fin_timeout", "1") // of a socket that nobody has open, both families
		}
		p.initForm(challenge, without)
		p.startProxy(inside)
		return p
	}
	// leave makes one connection on each path, and waits until the client's end has vanished and the proxy's has not.
	leave := func(t *testing.T, p *pod, world *testnet.Agent, ways []path) (all []connectsArgs) {
		for i, w := range ways {
			over := make(chan struct{})
			answer := sayPeer(serverFirst)
			a := w.again(uint16(61001+i), clientFirst)
			a.Count = 1
			a.To = w.start(func(c *net.TCPConn) {
				answer(c)
				<-over
			})
			t.Cleanup(func() { close(over) }) // before the server's own, which waits for its handlers
			wantThrough(t, p.client(w, world), a)
			all = append(all, a)
		}
		for i, w := range ways {
			a := all[i]
			p.ns.WaitSocket(t, w.name+": the proxy's end waits", func(s testnet.Socket) bool {
				return s.State == testnet.CloseWait && unmap(s.Local) == a.To && unmap(s.Remote) == a.From
			})
			testnet.Wait(t, w.name+": the client's end is gone", func() bool {
				for _, s := range w.clientNS.Sockets() {
					if unmap(s.Local) == a.From && unmap(s.Remote) == a.To {
						time.Sleep(50 * time.Millisecond)
						return false
					}
				}
				return true
			})
		}
		return all
	}
	p := prepare(t, "")
	world := p.ext.Agent(nil)
	for i, a := range leave(t, p, world, p.paths()) {
		w := p.paths()[i]
		t.Run(w.name, func(t *testing.T) { wantThrough(t, p.client(w, world), a) })
		if r := p.proxy.waitRecord(t, a.From); r.Reason != "client_reset" {
			t.Errorf("%s: record %+v of the connection that was left, want reason client_reset", w.name, r)
		}
	}
	t.Run("without the cure", func(t *testing.T) {
		p := prepare(t, "leftover")
		// Outbound alone: inbound, the cure is that only what meets a listener is taken at all, which cannot be left out.
		ways := p.paths()[:3]
		var hang []connecting
		for i, a := range leave(t, p, nil, ways) {
			hang = append(hang, ways[i].connecting(p.app, a))
		}
		wantHang(t, hang...)
	})
}

// TestAppIsKilled: when an app dies in a download or an upload, its kernel answers what still comes with resets; those must
// reach the proxy, so that the other end learns of it at its next write. Row 3.
func TestAppIsKilled(t *testing.T) {
	t.Parallel()
	t.Run("with the cure", func(t *testing.T) {
		t.Parallel()
		p := newCaptured(t, inside)
		for _, w := range p.paths() {
			t.Run(w.name, func(t *testing.T) {
				k := p.killApp(t, w)
				select {
				case err := <-k.end:
					if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
						t.Errorf("the other end got %v, want ECONNRESET or EPIPE", err)
					}
				case <-time.After(time.Minute):
					t.Fatal("the other end goes on writing")
				}
			})
		}
	})
	t.Run("without the cure", func(t *testing.T) {
		t.Parallel()
		p := newPod(t)
		p.initForm(challenge, "reflect")
		p.startProxy(inside)
		// Outbound alone: inbound the mark is right from lo on in any case.
		var killed []killedApp
		for _, w := range p.paths()[:3] {
			killed = append(killed, p.killApp(t, w))
		}
		for _, k := range killed {
			s := p.ns.WaitSocket(t, k.name+": the proxy repeats what nobody takes", func(s testnet.Socket) bool {
				select {
				case err := <-k.end:
					t.Fatalf("%s: the other end has learned of it: %v", k.name, err)
				default:
				}
				return unmap(s.Local) == k.proxy && unmap(s.Remote) == k.app && s.State == testnet.CloseWait && s.Retransmits >= 3
			})
			t.Logf("%s: the proxy has repeated a segment %d times, the other end writes on", k.name, s.Retransmits)
		}
	})
}

// killedApp is a connection whose app was killed while the other end writes.
type killedApp struct {
	name       string
	proxy, app netip.AddrPort // the ends of the app's own connection, whose peer is the proxy
	end        chan error     // what the other end got in the end
}

// killApp starts a transfer to an app of its own, kills the app while nothing is on the way to it (unread data would make
// its kernel send a reset at once), and lets the transfer go on.
func (p *pod) killApp(t *testing.T, w path) killedApp {
	t.Helper()
	app := p.ns.Agent(p.appCG)
	k := killedApp{name: w.name, end: make(chan error, 1)}
	killed := make(chan struct{})
	defer close(killed)
	goOn := func(c *net.TCPConn) {
		<-killed
		for {
			if _, err := c.Write(make([]byte, 1000)); err != nil {
				k.end <- err
				return
			}
			time.Sleep(5 * time.Millisecond) // a transfer that never ends needs no more
		}
	}
	if w.direction == "outbound" {
		to := w.start(func(c *net.TCPConn) {
			if err := errors.Join(readExactly(c, "x"), second(io.WriteString(c, "y"))); err != nil {
				k.end <- err
				return
			}
			goOn(c)
		})
		own, err := downloadOp.Call(app, connectsArgs{To: to, Mapped: w.name == "out/mapped", Ports: w.ports})
		if err != nil {
			t.Fatalf("%s: %v", w.name, err)
		}
		k.proxy, k.app = to, own
	} else {
		port, err := uploadOp.Call(app, uploadArgs{w.serveNet, net.JoinHostPort(w.serveHost, "0")})
		if err != nil {
			t.Fatalf("%s: %v", w.name, err)
		}
		to := netip.AddrPortFrom(w.to, port)
		c, err := w.dial(to)
		if err != nil {
			t.Fatalf("%s: %v", w.name, err)
		}
		t.Cleanup(func() { c.Close() })
		if _, err := io.WriteString(c, "x"); err != nil {
			t.Fatal(err)
		}
		line := make([]byte, 100) // whom the app sees
		n, err := c.Read(line)
		if err != nil {
			t.Fatal(err)
		}
		k.proxy, k.app = netip.MustParseAddrPort(string(line[:n])), to
		go goOn(c.TCPConn)
	}
	app.Kill()
	return k
}

// download connects in the agent, gets one byte for one, and then takes whatever comes until the agent is killed.
func download(a connectsArgs) (netip.AddrPort, error) {
	fd, err := a.connect()
	if err != nil {
		return netip.AddrPort{}, err
	}
	own, err := ownName(fd)
	if err != nil {
		return own, err
	}
	file := os.NewFile(uintptr(fd), "download")
	if err := errors.Join(second(file.WriteString("x")), readExactly(file, "y")); err != nil {
		return own, err
	}
	go func() { _, _ = io.Copy(io.Discard, file) }()
	return own, nil
}

type uploadArgs struct{ Network, Addr string }

// upload listens in the agent and answers one byte with the address that it came from; then it takes whatever comes.
func upload(a uploadArgs) (port uint16, err error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(context.Background(), a.Network, a.Addr)
	if err != nil {
		return 0, err
	}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				if readExactly(c, "x") == nil {
					fmt.Fprint(c, unmap(addrPort(c.RemoteAddr())))
					_, _ = io.Copy(io.Discard, c)
				}
			}()
		}
	}()
	return addrPort(ln.Addr()).Port(), nil
}
