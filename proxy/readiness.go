// SPDX-License-Identifier: Apache-2.0

package proxy

import (
	"errors"
	"sync"

	"github.com/pillionproxy/pillion/proxy/upstream"
)

// phase is where a server is in its life.
type phase int

const (
	listening phase = iota // connections queue in the kernel
	serving
	draining
)

var (
	errNotServing = errors.New("not serving yet: connections wait in the listeners' queues")
	errDraining   = errors.New("draining: no new connections are accepted")
	errUnproven   = errors.New("not yet proven that the proxy's own dials pass uncaptured")
)

// readiness is whether the server can relay, and if not, why.
type readiness struct {
	mu        sync.Mutex
	phase     phase
	abandoned bool  // closed before it served
	proven    bool  // a proof has succeeded, and nothing has contradicted it since
	doubt     error // why not, if a proof has failed
}

func (r *readiness) ready() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.phase == listening:
		return errNotServing
	case r.phase == draining:
		return errDraining
	case r.proven:
		return nil
	case r.doubt != nil:
		return r.doubt
	default:
		return errUnproven
	}
}

func (r *readiness) drain() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.phase = draining
}

// prove notes the result of a proof, or what contradicts one. changed reports whether it differs in outcome from before.
func (r *readiness) prove(err error) (changed bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	changed = r.proven != (err == nil) || err != nil && r.doubt == nil
	r.proven, r.doubt = err == nil, err
	return changed
}

// looping reports whether a dial of ours has come back, and none has been seen to come through since.
func (r *readiness) looping() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return errors.Is(r.doubt, upstream.ErrCaptured)
}

// begin begins to serve, unless it was abandoned.
func (r *readiness) begin() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.abandoned {
		r.phase = serving
	}
	return !r.abandoned
}

// abandon makes sure that nobody begins to serve, unless somebody has, or it was abandoned before.
func (r *readiness) abandon() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.phase != listening || r.abandoned {
		return false
	}
	r.abandoned = true
	return true
}
