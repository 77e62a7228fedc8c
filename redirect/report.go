// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"fmt"

	"github.com/pillionproxy/pillion/config"
)

// State of one part of a capture.
type State string

// The states.
const (
	StateOK      State = "ok"
	StateMissing State = "missing"
	StateWrong   State = "wrong"
	StateUnknown State = "unknown" // could not be asked for
)

// Item is one part of a capture as it was found.
type Item struct {
	Kind   string `json:"kind"` // hook, filter, sysctl, route, rule, proxy
	Name   string `json:"name"`
	State  State  `json:"state"`
	Detail string `json:"detail,omitempty"`
}

// Report is what there is of one capture.
type Report struct {
	Backend  string            `json:"backend"`
	Slot     config.Slot       `json:"slot"`
	Cgroup   string            `json:"cgroup,omitempty"` // empty: no directory with that id was found
	CgroupID uint64            `json:"cgroup_id"`
	Items    []Item            `json:"items"`
	Policy   *config.Capture   `json:"policy,omitempty"`   // nil where it may not be read
	Counters map[string]uint64 `json:"counters,omitempty"` // per verdict; nil where they may not be read
}

// Effective reports whether every part is there, so that nothing passes uncaptured. A proxy that does not listen is no
// part of it: what happens then is the policy's.
func (r Report) Effective() bool {
	for _, i := range r.Items {
		if i.Kind != "proxy" && i.State != StateOK && i.State != StateUnknown {
			return false
		}
	}
	return len(r.Items) > 0
}

// Check is the outcome of one proof by a real connection.
type Check struct {
	Family    Family `json:"family"`
	Mapped    bool   `json:"mapped,omitempty"` // IPv4 by an IPv6 socket (RFC 4291 section 2.5.5.2)
	Direction string `json:"direction"`        // route, outbound, inbound, proxy
	Interface string `json:"interface,omitempty"`
	Rule      string `json:"rule,omitempty"` // of the selection, that the connection was to show
	OK        bool   `json:"ok"`
	Proven    bool   `json:"proven"` // false: could not be tried; Detail says why
	Detail    string `json:"detail"`
}

func (c Check) String() string {
	what := fmt.Sprintf("IPv%d %s", c.Family, c.Direction)
	if c.Mapped {
		what = fmt.Sprintf("IPv%d (mapped) %s", c.Family, c.Direction)
	}
	if c.Interface != "" {
		what += " " + c.Interface
	}
	what += ": " + c.Detail
	if c.Rule != "" {
		what += " (" + c.Rule + ")"
	}
	return what
}
