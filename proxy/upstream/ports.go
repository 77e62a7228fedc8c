// SPDX-License-Identifier: Apache-2.0

package upstream

import (
	"sync/atomic"

	"github.com/pillionproxy/pillion/config"
)

// ports walks a range, over and over: a port that was just used is the last to be used again, so that what its connection
// left behind (TIME_WAIT, here or at the peer) is mostly gone by then.
type ports struct {
	config.PortRange
	walked atomic.Uint32
}

func (p *ports) next() uint16 {
	n := (p.walked.Add(1) - 1) % uint32(p.Len())
	return p.First + uint16(n)
}
