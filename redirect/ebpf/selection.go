// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
	"github.com/pillionproxy/pillion/bpf"
	"github.com/pillionproxy/pillion/config"
)

// Supports refuses what this backend cannot honour.
func Supports(policy config.Capture) error {
	if !policy.Selection.OutboundInterfaces.IsZero() {
		return &config.Fault{
			Err:  errors.New("--include-outbound-interfaces, --exclude-outbound-interfaces: the backend ebpf decides before the kernel says by which interface a connection would leave"),
			Hint: "name the addresses behind the interface with --exclude-outbound-cidrs, or take --backend tproxy or redirect",
			Exit: config.ExitConfig,
		}
	}
	return nil
}

// selector is a Selection as the programs look it up (bpf/select.h): for each kind, prefixes of values, each with what all
// prefixes around it say too.
type selector struct {
	kinds, includes bpf.CaptureSelectKind
	entries         map[selectKey]bpf.CaptureSelectFlag
}

// selectKey is a key of the map `selection`: struct select_key.
type selectKey struct {
	Bits  uint32 // of the kind and the value
	Kind  bpf.CaptureSelectKind
	Value [16]byte
}

const kindBits = 32

// newSelector renders a selection. excluded are the ids of its ExcludeCgroups.
func newSelector(s config.Selection, excluded []uint64) selector {
	r := selector{entries: make(map[selectKey]bpf.CaptureSelectFlag)}
	add(&r, bpf.CaptureSelectKindSELECT_OUT_ADDRESS, s.OutboundCIDRs, cidr)
	add(&r, bpf.CaptureSelectKindSELECT_IN_ADDRESS, s.InboundCIDRs, cidr)
	add(&r, bpf.CaptureSelectKindSELECT_OUT_PORT, s.OutboundPorts, ports)
	add(&r, bpf.CaptureSelectKindSELECT_IN_PORT, s.InboundPorts, ports)
	add(&r, bpf.CaptureSelectKindSELECT_UID, s.UIDs, ids)
	add(&r, bpf.CaptureSelectKindSELECT_GID, s.GIDs, ids)
	add(&r, bpf.CaptureSelectKindSELECT_CGROUP, config.Selector[uint64]{Exclude: excluded}, func(id uint64, put putPrefix) {
		put(0, 64, binary.NativeEndian.AppendUint64(nil, id))
	})
	r.inherit()
	return r
}

// putPrefix takes the first bits of a value; family is SELECT_IPV4 or 0.
type putPrefix func(family bpf.CaptureSelectKind, bits int, value []byte)

func add[T any](r *selector, kind bpf.CaptureSelectKind, s config.Selector[T], prefixes func(T, putPrefix)) {
	if s.IsZero() {
		return
	}
	r.kinds |= kind
	if len(s.Include) > 0 {
		r.includes |= kind
	}
	put := func(flag bpf.CaptureSelectFlag) putPrefix {
		return func(family bpf.CaptureSelectKind, bits int, value []byte) {
			k := selectKey{Bits: kindBits + uint32(bits), Kind: kind | family}
			copy(k.Value[:], value)
			r.entries[k] |= flag
		}
	}
	for _, v := range s.Include {
		prefixes(v, put(bpf.CaptureSelectFlagSELECT_INCLUDE))
	}
	for _, v := range s.Exclude {
		prefixes(v, put(bpf.CaptureSelectFlagSELECT_EXCLUDE))
	}
}

func cidr(p netip.Prefix, put putPrefix) {
	var family bpf.CaptureSelectKind
	if p.Addr().Is4() {
		family = bpf.CaptureSelectKindSELECT_IPV4
	}
	put(family, p.Bits(), p.Addr().AsSlice())
}

func ports(r config.PortRange, put putPrefix) {
	cut(uint64(r.First), uint64(r.Last), 16, func(bits int, v uint64) { put(0, bits, binary.BigEndian.AppendUint16(nil, uint16(v))) })
}

func ids(r config.IDRange, put putPrefix) {
	cut(uint64(r.First), uint64(r.Last), 32, func(bits int, v uint64) { put(0, bits, binary.BigEndian.AppendUint32(nil, uint32(v))) })
}

// cut divides an inclusive range of numbers of so many bits into the fewest prefixes.
func cut(first, last uint64, width int, put func(bits int, v uint64)) {
	for first <= last {
		size := 0 // of the block, as a power of two
		for size < width && first&(1<<size) == 0 && first+(2<<size)-1 <= last {
			size++
		}
		put(width-size, first)
		first += 1 << size
	}
}

// inherit gives every prefix what the shorter ones around it say.
func (r *selector) inherit() {
	own := make(map[selectKey]bpf.CaptureSelectFlag, len(r.entries))
	for k, flags := range r.entries {
		own[k] = flags
	}
	for k := range r.entries {
		for around := k; around.Bits > kindBits; {
			around.Bits--
			around.clear(around.Bits - kindBits)
			r.entries[k] |= own[around]
		}
	}
}

// clear takes the given bit out of the value, counted from the first.
func (k *selectKey) clear(bit uint32) { k.Value[bit/8] &^= 0x80 >> (bit % 8) }

// fill writes the entries into the map of a loaded collection, which the loader made large enough.
func (r selector) fill(m *ebpf.Map) error {
	for k, flags := range r.entries {
		if err := m.Put(k, flags); err != nil {
			return fmt.Errorf("write the selection: %w", err)
		}
	}
	return nil
}
