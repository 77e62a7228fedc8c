// SPDX-License-Identifier: Apache-2.0

package udp

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/proxy/telemetry"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// side is one whose clients are on this host: its answers come from a port of its own. It observes the flows, too.
type side struct {
	told   chan unix.Errno
	closed chan telemetry.Connection
}

func (s *side) Opened(telemetry.Connection)   {}
func (s *side) Closed(c telemetry.Connection) { s.closed <- c }

func (s *side) Answer(_, client netip.AddrPort) (*net.UDPConn, error) {
	return net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(client))
}

func (s *side) Refuse(_, _ netip.AddrPort, why unix.Errno) {
	s.told <- why
}

// newRelay serves a relay until the test ends, and is spoken to by its flow method: its listeners take transparent sockets.
func newRelay(t *testing.T) (*Relay, *side) {
	t.Helper()
	s := &side{told: make(chan unix.Errno, 100), closed: make(chan telemetry.Connection, 100)}
	r, err := New(nil, s, telemetry.NewBook(slog.New(slog.DiscardHandler), s))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan struct{})
	go func() { defer close(served); r.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-served
		if len(r.flows) != 0 {
			t.Errorf("%d flows are left", len(r.flows))
		}
		if live := r.book.Live(); len(live) != 0 {
			t.Errorf("%v are still in the book", live)
		}
		goleak.VerifyNone(t)
	})
	return r, s
}

func listen(t *testing.T) (*net.UDPConn, netip.AddrPort) {
	t.Helper()
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	return c, c.LocalAddr().(*net.UDPAddr).AddrPort()
}

// TestFlow: datagrams of a flow go to whom the client meant, whole, and what comes back goes to the client.
func TestFlow(t *testing.T) {
	r, _ := newRelay(t)
	client, from := listen(t)
	server, to := listen(t)
	f, err := r.flow(key{from, to})
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, maxDatagram)
	for _, size := range []int{0, 1, 1500, 65000} {
		r.send(f, make([]byte, size))
		n, peer, err := server.ReadFromUDPAddrPort(b)
		if err != nil || n != size {
			t.Fatalf("the server got %d bytes (%v), want %d", n, err, size)
		}
		if _, err := server.WriteToUDPAddrPort(make([]byte, size), peer); err != nil {
			t.Fatal(err)
		}
		if n, err := client.Read(b); err != nil || n != size {
			t.Fatalf("the client got %d bytes (%v), want %d", n, err, size)
		}
	}
	if again, err := r.flow(key{from, to}); again != f || err != nil {
		t.Errorf("the same flow is another one: %v", err)
	}
}

// TestRefused: the client is told; the flow goes on, and carries when there is somebody, however often it was refused before.
func TestRefused(t *testing.T) {
	r, s := newRelay(t)
	client, from := listen(t)
	server, to := listen(t)
	_ = server.Close()
	f, err := r.flow(key{from, to})
	if err != nil {
		t.Fatal(err)
	}
	for range 2000 {
		r.send(f, []byte("is anybody there?"))
		if why := <-s.told; why != unix.ECONNREFUSED {
			t.Fatalf("refused with %v, want ECONNREFUSED", why)
		}
	}
	server, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(to))
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	r.send(f, []byte("hello"))
	b := make([]byte, maxDatagram)
	n, peer, err := server.ReadFromUDPAddrPort(b)
	if err != nil || string(b[:n]) != "hello" {
		t.Fatalf("%q, %v", b[:n], err)
	}
	large := b[:60000] // needs room that reports of errors do not take
	if _, err := server.WriteToUDPAddrPort(large, peer); err != nil {
		t.Fatal(err)
	}
	if n, err := client.Read(b); n != len(large) || err != nil {
		t.Errorf("the client got %d bytes, %v", n, err)
	}
}

// TestBounded: there are no more flows than may be; the one that has been idle for longest makes room.
func TestBounded(t *testing.T) {
	r, s := newRelay(t)
	r.most = 3
	_, to := listen(t)
	var flows []*flow
	for range r.most + 1 {
		_, from := listen(t)
		f, err := r.flow(key{from, to})
		if err != nil {
			t.Fatal(err)
		}
		flows = append(flows, f)
	}
	if c := <-s.closed; c.Source != flows[0].client || c.Reason != telemetry.ConnectionLimit || c.Error == "" {
		t.Errorf("what ended is %+v; want the first flow, for the limit, with an explanation", c)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.flows) != r.most || r.flows[flows[0].key] != nil || r.flows[flows[r.most].key] != flows[r.most] {
		t.Errorf("%d flows, want %d, without the first and with the last", len(r.flows), r.most)
	}
}

// TestBook: of a flow it is known whom it was for, what it carried, and how it ended.
func TestBook(t *testing.T) {
	r, s := newRelay(t)
	for _, c := range []struct {
		name   string
		serve  func(*net.UDPConn)
		reason telemetry.Reason
		error  string
		bytes  [2]uint64
	}{
		{"answered", func(c *net.UDPConn) {
			b := make([]byte, 100)
			n, peer, _ := c.ReadFromUDPAddrPort(b)
			_, _ = c.WriteToUDPAddrPort(append(b[:n], "..."...), peer)
		}, telemetry.OK, "", [2]uint64{5, 8}},
		{"refused", func(c *net.UDPConn) { _ = c.Close() }, telemetry.UpstreamConnectRefused, "connection refused", [2]uint64{5, 0}},
	} {
		t.Run(c.name, func(t *testing.T) {
			client, from := listen(t)
			server, to := listen(t)
			if c.reason != telemetry.OK {
				c.serve(server)
			}
			f, err := r.flow(key{from, to})
			if err != nil {
				t.Fatal(err)
			}
			r.send(f, []byte("hello"))
			if c.reason == telemetry.OK {
				c.serve(server)
				_, _ = client.Read(make([]byte, 100))
			} else {
				<-s.told
			}
			f.close()
			got := <-s.closed
			if got.Source != from || got.Destination != to || got.Protocol != telemetry.UDP || got.Upstream.Addr() != from.Addr() {
				t.Errorf("%+v, want UDP from %s to %s", got, from, to)
			}
			if got.Reason != c.reason || got.Error != c.error || [2]uint64{got.Sent, got.Received} != c.bytes {
				t.Errorf("%+v, want %s, %q, %v", got, c.reason, c.error, c.bytes)
			}
		})
	}
}

// TestIdle: a flow that asked once is not kept as long as one on which more was said.
func TestIdle(t *testing.T) {
	for _, tt := range []struct {
		answered int64
		refusal  unix.Errno
		want     time.Duration
	}{
		{0, 0, idle},
		{1, 0, idleOnce},
		{2, 0, idle},
		{0, unix.ECONNREFUSED, idleOnce},
		{2, unix.EHOSTUNREACH, idle}, // a refusal on the way, as when a route is changed
	} {
		f := &flow{}
		f.answered.Store(tt.answered)
		f.refusal.Store(uintptr(tt.refusal))
		f.touch()
		if got := f.left(); got > tt.want || got < tt.want-idleOnce/2 {
			t.Errorf("%d answers, %v: %s are left, want %s", tt.answered, tt.refusal, got, tt.want)
		}
	}
}

// TestLate: a datagram that was read while the relay was told to end begins no flow.
func TestLate(t *testing.T) {
	r, err := New(nil, &side{}, telemetry.NewBook(slog.New(slog.DiscardHandler), nil))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	r.Serve(ctx)
	_, from := listen(t)
	_, to := listen(t)
	if _, err := r.flow(key{from, to}); !errors.Is(err, errClosed) || len(r.flows) > 0 {
		t.Errorf("%v, and %d flows; want %v, and none", err, len(r.flows), errClosed)
	}
}

// FuzzMeantFor: control messages are the kernel's; those of another shape are nobody's.
func FuzzMeantFor(f *testing.F) {
	message := func(level, kind int, data []byte) []byte {
		b := binary.NativeEndian.AppendUint64(nil, uint64(unix.CmsgLen(len(data))))
		b = binary.NativeEndian.AppendUint32(b, uint32(level))
		b = binary.NativeEndian.AppendUint32(b, uint32(kind))
		return append(append(b, data...), make([]byte, unix.CmsgSpace(len(data))-unix.CmsgLen(len(data)))...)
	}
	v4 := append([]byte{2, 0, 0, 53, 192, 0, 2, 1}, make([]byte, 8)...)
	v6 := append(append([]byte{10, 0, 0, 53, 0, 0, 0, 0}, netip.MustParseAddr("2001:db8::1").AsSlice()...), 0, 0, 0, 0)
	f.Add(message(unix.SOL_IP, unix.IP_RECVORIGDSTADDR, v4))
	f.Add(message(unix.SOL_IPV6, unix.IPV6_RECVORIGDSTADDR, v6))
	f.Add(message(unix.SOL_IP, unix.IP_RECVORIGDSTADDR, v4[:7]))
	f.Add([]byte{1, 2, 3})
	for control, want := range map[string]string{
		string(message(unix.SOL_IP, unix.IP_RECVORIGDSTADDR, v4)):     "192.0.2.1:53",
		string(message(unix.SOL_IPV6, unix.IPV6_RECVORIGDSTADDR, v6)): "[2001:db8::1]:53",
	} {
		if got, ok := meantFor([]byte(control)); !ok || got.String() != want {
			f.Errorf("%s, %v; want %s", got, ok, want)
		}
	}
	f.Fuzz(func(_ *testing.T, control []byte) { meantFor(control) })
}

// TestNotASocket: what is no socket is refused, and closed.
func TestNotASocket(t *testing.T) {
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New([]*os.File{file}, &side{}, telemetry.NewBook(slog.Default(), nil)); err == nil {
		t.Error("/dev/null is a socket")
	}
	if err := file.Close(); err == nil {
		t.Error("the file was left open")
	}
}
