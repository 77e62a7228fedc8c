// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"net/netip"
	"sync"
)

// own holds the dials of the proxy. It is sharded by port, so that dials seldom meet at a lock.
type own [16]shard

type shard struct {
	mu    sync.Mutex
	dials map[addresses]*entry
}

// addresses are those of a dial, without zones: what comes back may have come by another device.
type addresses struct{ local, remote netip.AddrPort }

// entry is one dial.
type entry struct {
	shard    *shard
	key      addresses
	captured chan struct{} // closed when it is found
	found    bool          // guarded by the shard's lock
	probe    bool
}

func key(local, remote netip.AddrPort) addresses {
	return addresses{
		netip.AddrPortFrom(local.Addr().WithZone(""), local.Port()),
		netip.AddrPortFrom(remote.Addr().WithZone(""), remote.Port()),
	}
}

func (o *own) shard(port uint16) *shard { return &o[port%uint16(len(o))] }

// add enters a dial; nil if there is such a dial already. captured is closed when it is found; it is nil but for probes.
func (o *own) add(local, remote netip.AddrPort, captured chan struct{}) *entry {
	s := o.shard(local.Port())
	e := &entry{shard: s, key: key(local, remote), captured: captured, probe: captured != nil}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dials == nil {
		s.dials = make(map[addresses]*entry)
	}
	if s.dials[e.key] != nil {
		return nil
	}
	s.dials[e.key] = e
	return e
}

// foreign is the entry of a dial that was not ours and cannot come back.
func foreign() *entry { return &entry{shard: new(shard)} }

// forget takes the dial out. It may be called again, even when its addresses are another dial's by then.
func (e *entry) forget() {
	e.shard.mu.Lock()
	defer e.shard.mu.Unlock()
	if e.shard.dials[e.key] == e {
		delete(e.shard.dials, e.key)
	}
}

// wasFound reports whether the dial has come back to the proxy.
func (e *entry) wasFound() bool {
	e.shard.mu.Lock()
	defer e.shard.mu.Unlock()
	return e.found
}

// find looks for the dial whose local address an accepted connection came from, and whose remote address it meant. Both
// must fit: the app may use the ports of our ranges too, towards other destinations.
func (o *own) find(remote, local netip.AddrPort) (own, probe bool) {
	s := o.shard(remote.Port())
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.dials[key(remote, local)]
	if e == nil {
		return false, false
	}
	if e.probe && !e.found {
		close(e.captured)
	}
	e.found = true
	return true, e.probe
}
