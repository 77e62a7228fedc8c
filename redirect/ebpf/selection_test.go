// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/pillionproxy/pillion/bpf"
	"github.com/pillionproxy/pillion/config"
)

// lookup is what the programs do with the kernel's trie.
func (r selector) lookup(kind, family bpf.CaptureSelectKind, bits int, value []byte) bool {
	if r.kinds&kind == 0 {
		return true
	}
	k := selectKey{Bits: kindBits + uint32(bits), Kind: kind | family}
	copy(k.Value[:], value)
	for i := bits; i < 128; i++ {
		k.clear(uint32(i))
	}
	for {
		if flags, ok := r.entries[k]; ok {
			if flags&bpf.CaptureSelectFlagSELECT_EXCLUDE != 0 {
				return false
			}
			return flags&bpf.CaptureSelectFlagSELECT_INCLUDE != 0 || r.includes&kind == 0
		}
		if k.Bits == kindBits {
			return r.includes&kind == 0
		}
		k.Bits--
		k.clear(k.Bits - kindBits)
	}
}

func (r selector) judge(f config.Flow) bool {
	b := func(kind bpf.CaptureSelectKind, put func(putPrefix)) (in bool) {
		put(func(family bpf.CaptureSelectKind, bits int, value []byte) { in = r.lookup(kind, family, bits, value) })
		return in
	}
	addr := func(put putPrefix) { cidr(netip.PrefixFrom(f.Address.Addr(), f.Address.Addr().BitLen()), put) }
	port := func(put putPrefix) { ports(config.PortRange{First: f.Address.Port(), Last: f.Address.Port()}, put) }
	if f.Inbound {
		return b(bpf.CaptureSelectKindSELECT_IN_ADDRESS, addr) && b(bpf.CaptureSelectKindSELECT_IN_PORT, port)
	}
	return b(bpf.CaptureSelectKindSELECT_OUT_ADDRESS, addr) && b(bpf.CaptureSelectKindSELECT_OUT_PORT, port) &&
		b(bpf.CaptureSelectKindSELECT_UID, func(put putPrefix) { ids(config.IDRange{First: f.UID, Last: f.UID}, put) }) &&
		b(bpf.CaptureSelectKindSELECT_GID, func(put putPrefix) { ids(config.IDRange{First: f.GID, Last: f.GID}, put) })
}

// TestSelectorJudgesAsTheSelection: random selections and flows near their edges; the trie says what Judge says.
func TestSelectorJudgesAsTheSelection(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		var s config.Selection
		s.OutboundPorts, s.InboundPorts = randomSelector(r, randomPorts), randomSelector(r, randomPorts)
		s.OutboundCIDRs, s.InboundCIDRs = randomSelector(r, randomCIDR), randomSelector(r, randomCIDR)
		s.UIDs, s.GIDs = randomSelector(r, randomIDs), randomSelector(r, randomIDs)
		sel := newSelector(s, nil)
		for range 100 {
			f := config.Flow{Inbound: r.IntN(2) == 0, Address: netip.AddrPortFrom(randomAddr(r), randomPort(r)), UID: randomID(r), GID: randomID(r)}
			if got, want := sel.judge(f), s.Judge(f); got != want.Captured {
				t.Fatalf("%+v of %+v: captured %v; Judge says %+v", f, s, got, want)
			}
		}
	}
}

func randomSelector[T any](r *rand.Rand, one func(*rand.Rand) T) (s config.Selector[T]) {
	for range r.IntN(4) {
		s.Include = append(s.Include, one(r))
	}
	for range r.IntN(4) {
		s.Exclude = append(s.Exclude, one(r))
	}
	return s
}

// Few values, so that entries nest, touch and are hit.
func randomPort(r *rand.Rand) uint16 {
	return []uint16{0, 1, 79, 80, 81, 443, 8000, 8999, 9000, 65534, 65535}[r.IntN(11)]
}

func randomPorts(r *rand.Rand) config.PortRange {
	a, b := randomPort(r), randomPort(r)
	return config.PortRange{First: min(a, b), Last: max(a, b)}
}

func randomID(r *rand.Rand) uint32 {
	return []uint32{0, 1, 999, 1000, 1999, 2000, 65534, 1<<31 - 1, 1 << 31, 1<<32 - 2}[r.IntN(10)]
}

func randomIDs(r *rand.Rand) config.IDRange {
	a, b := randomID(r), randomID(r)
	return config.IDRange{First: min(a, b), Last: max(a, b)}
}

func randomAddr(r *rand.Rand) netip.Addr {
	return netip.MustParseAddr([]string{"0.0.0.0", "10.0.0.0", "10.0.0.1", "10.255.255.255", "11.0.0.0", "255.255.255.255", "::1", "fd00::", "fd00::1", "fdff::", "fe00::"}[r.IntN(11)])
}

func randomCIDR(r *rand.Rand) netip.Prefix {
	a := randomAddr(r)
	bits := []int{0, 1, 7, 8, 9, 16, a.BitLen() - 1, a.BitLen()}[r.IntN(8)]
	return netip.PrefixFrom(a, bits).Masked()
}

func TestCut(t *testing.T) {
	for _, tt := range []struct {
		first, last uint64
		width, want int
	}{{0, 65535, 16, 1}, {0, 0, 16, 1}, {65535, 65535, 16, 1}, {1, 65534, 16, 30}, {8000, 8999, 16, 6}, {0, 1<<32 - 1, 32, 1}, {1, 1<<32 - 2, 32, 62}} {
		n, next := 0, tt.first
		cut(tt.first, tt.last, tt.width, func(bits int, v uint64) {
			n++
			if v != next || v%(1<<(tt.width-bits)) != 0 {
				t.Errorf("%d-%d: a block of %d bits at %d, want one at %d", tt.first, tt.last, bits, v, next)
			}
			next = v + 1<<(tt.width-bits)
		})
		if next != tt.last+1 || n != tt.want {
			t.Errorf("%d-%d: %d blocks up to %d, want %d", tt.first, tt.last, n, next-1, tt.want)
		}
	}
}
