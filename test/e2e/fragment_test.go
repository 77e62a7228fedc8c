// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/pillionproxy/pillion/test/testnet"
	"golang.org/x/sys/unix"
)

// TestFragmentedSYN is row 23: a socket that is given to the first fragment of a SYN is lost in reassembly, and the app's
// own listener answers: anyone outside could pass by the sidecar. IPv6 itself (RFC 7112) drops what is cut within the
// header.
func TestFragmentedSYN(t *testing.T) {
	t.Parallel()
	type syn struct {
		from, to string
		cut      int // bytes of TCP in the first fragment; 0: not fragmented
	}
	all := []syn{
		{client4, pod4, 8},
		{client4, pod4, 16},
		{client4, pod4, 24},
		{client6, pod6, 8},
		{client6, pod6, 16},
		{client6, pod6, 24},
	}
	for _, without := range []string{"", "fragment"} {
		name := "with the cure"
		if without != "" {
			name = "without the cure"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newUncured(t, without, nil)
			listener := p.app.Serve("tcp", "[::]:0", func(*net.TCPConn) {})
			// Neighbours are found, and connections go through the sidecar, before a packet is made by hand.
			for _, w := range p.paths()[3:] {
				p.captured(t, w)
			}
			for i, s := range all {
				t.Run(fmt.Sprintf("%s cut at %d", s.to, s.cut), func(t *testing.T) {
					from, to := netip.MustParseAddr(s.from), netip.AddrPortFrom(netip.MustParseAddr(s.to), listener.Addr.Port())
					raw := rawTCP(t, p.ext, from)
					defer raw.Close()
					cut, whole := uint16(40000+i), uint16(41000+i)
					raw.sendSYN(t, netip.AddrPortFrom(from, cut), to, s.cut)
					// Behind it, on the same way, one that is answered: by then the first one is dealt with.
					raw.sendSYN(t, netip.AddrPortFrom(from, whole), to, 0)
					answered := map[uint16]bool{}
					testnet.Wait(t, "the SYN that is whole is answered", func() bool {
						raw.synACKs(t, to.Port(), answered)
						return answered[whole]
					})
					hazard := without != "" && (s.cut == 24 || to.Addr().Is4())
					if answered[cut] != hazard {
						t.Errorf("the fragmented SYN was answered: %v, want %v", answered[cut], hazard)
					}
				})
			}
			if without == "" {
				if dropped := p.counters(t)["in_fragment"]; dropped < uint64(len(all)) {
					t.Errorf("%d packets were dropped as fragments, want %d", dropped, len(all))
				}
			}
		})
	}
}

// rawSocket sends whole IP packets, and sees all TCP that comes in.
type rawSocket struct {
	send, receive *os.File
	v6            bool
}

func (r *rawSocket) Close() {
	r.send.Close()
	r.receive.Close()
}

// sendSYN sends a SYN, in two fragments if it is to be cut.
func (r *rawSocket) sendSYN(t *testing.T, from, to netip.AddrPort, cut int) {
	t.Helper()
	tcp := make([]byte, 40) // a header of 24 bytes, and data, so that there is something to cut off behind it
	binary.BigEndian.PutUint16(tcp, from.Port())
	binary.BigEndian.PutUint16(tcp[2:], to.Port())
	binary.BigEndian.PutUint32(tcp[4:], 1000)
	tcp[12], tcp[13] = 6<<4, 2 // SYN
	binary.BigEndian.PutUint16(tcp[14:], 65000)
	copy(tcp[20:], []byte{2, 4, 5, 0xb4}) // MSS 1460
	binary.BigEndian.PutUint16(tcp[16:], tcpChecksum(from.Addr(), to.Addr(), tcp))
	parts := [][]byte{tcp}
	if cut > 0 {
		parts = [][]byte{tcp[:cut], tcp[cut:]}
	}
	offset := 0
	for i, part := range parts {
		packet := ipPacket(from.Addr(), to.Addr(), from.Port(), offset, i < len(parts)-1, cut > 0, part)
		var sa unix.Sockaddr = &unix.SockaddrInet6{Addr: to.Addr().As16()}
		if !r.v6 {
			sa = &unix.SockaddrInet4{Addr: to.Addr().As4()}
		}
		if err := unix.Sendto(int(r.send.Fd()), packet, 0, sa); err != nil {
			t.Fatal(err)
		}
		offset += len(part)
	}
}

// ipPacket is an IPv4 packet, or an IPv6 one with a fragment header where it is needed. The kernel completes the IPv4
// header's checksum and length.
func ipPacket(from, to netip.Addr, id uint16, offset int, more, fragment bool, payload []byte) []byte {
	if from.Is4() {
		h := make([]byte, 20)
		h[0], h[8], h[9] = 0x45, 64, unix.IPPROTO_TCP
		binary.BigEndian.PutUint16(h[4:], id)
		binary.BigEndian.PutUint16(h[6:], uint16(offset/8))
		if more {
			h[6] |= 0x20
		}
		copy(h[12:], from.AsSlice())
		copy(h[16:], to.AsSlice())
		return append(h, payload...)
	}
	h := make([]byte, 40)
	h[0], h[6], h[7] = 6<<4, unix.IPPROTO_TCP, 64
	copy(h[8:], from.AsSlice())
	copy(h[24:], to.AsSlice())
	if fragment {
		f := make([]byte, 8)
		f[0], h[6] = unix.IPPROTO_TCP, unix.IPPROTO_FRAGMENT
		binary.BigEndian.PutUint16(f[2:], uint16(offset))
		if more {
			f[3] |= 1
		}
		binary.BigEndian.PutUint32(f[4:], uint32(id))
		h = append(h, f...)
	}
	binary.BigEndian.PutUint16(h[4:], uint16(len(h)-40+len(payload)))
	return append(h, payload...)
}

// tcpChecksum is that of RFC 9293 section 3.1, over the pseudo header and the segment.
func tcpChecksum(from, to netip.Addr, segment []byte) uint16 {
	b := append(from.AsSlice(), to.AsSlice()...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(segment)))
	b = append(b, 0, 0, 0, unix.IPPROTO_TCP)
	b = append(b, segment...)
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// synACKs adds the ports of ours to which a SYN-ACK from the port came.
func (r *rawSocket) synACKs(t *testing.T, port uint16, to map[uint16]bool) {
	t.Helper()
	b := make([]byte, 2000)
	for {
		n, _, err := unix.Recvfrom(int(r.receive.Fd()), b, unix.MSG_DONTWAIT)
		if err == unix.EAGAIN {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		tcp := b[:n]
		if !r.v6 { // IPv4 comes with its header
			tcp = tcp[int(b[0]&15)*4:]
		}
		if len(tcp) >= 20 && binary.BigEndian.Uint16(tcp) == port && tcp[13]&0x12 == 0x12 {
			to[binary.BigEndian.Uint16(tcp[2:])] = true
		}
	}
}

// rawTCP opens the sockets for a source address of the namespace.
func rawTCP(t *testing.T, ns *testnet.Namespace, from netip.Addr) *rawSocket {
	t.Helper()
	family := unix.AF_INET
	if from.Is6() {
		family = unix.AF_INET6
	}
	var fds [2]int
	var errs [2]error
	ns.Do(func() {
		for i, protocol := range []int{unix.IPPROTO_RAW, unix.IPPROTO_TCP} {
			fds[i], errs[i] = unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
		}
	})
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
	return &rawSocket{os.NewFile(uintptr(fds[0]), "raw"), os.NewFile(uintptr(fds[1]), "raw TCP"), from.Is6()}
}
