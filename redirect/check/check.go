// SPDX-License-Identifier: Apache-2.0

// Package check says, before anything is installed, what a host offers to each backend of the capture: `pillion check`.
//
// It has three parts that meet in plain data: Gather asks the host and gives Facts, RunLab tries out in namespaces of its
// own what cannot be asked for (packet filter rules, qdiscs), and Judge turns Facts into rows and verdicts.
//
// What always holds: Judge is a pure function, so that the verdict over any host can be tested on any other; and neither
// Gather nor RunLab changes the host: no rule, filter, program, parameter or file of it. The kernel may load modules that
// it is asked about. What this process may not ask is unknown, with what the question takes, and no error.
package check

import (
	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
)

// Backend is a way to capture.
type Backend string

// The backends, in the order in which `auto` tries them.
const (
	EBPF     Backend = "ebpf"     // BPF on a cgroup
	TProxy   Backend = "tproxy"   // iptables, mangle table
	Redirect Backend = "redirect" // iptables, nat table
	Rootless Backend = "rootless" // a user and network namespace of our own
)

// Backends are all of them.
func Backends() []Backend { return []Backend{EBPF, TProxy, Redirect, Rootless} }

// State is what was found of one thing.
type State string

// The states.
const (
	OK       State = "ok"
	Missing  State = "missing"
	Unknown  State = "unknown"  // could not be asked for
	Conflict State = "conflict" // somebody else is in the way
)

// Need says what a backend does without a thing.
type Need string

// The needs.
const (
	Required Need = "required"
	Better   Need = "better" // it works with less; Row.Lost says what is lost
)

// Row is one thing that was looked for.
type Row struct {
	Group  string           `json:"group"`
	What   string           `json:"what"`
	State  State            `json:"state"`
	Detail string           `json:"detail,omitempty"`
	Hint   string           `json:"hint,omitempty"` // what to do about it; empty where the state is ok
	Lost   string           `json:"lost,omitempty"` // what does not work without it
	Needs  map[Backend]Need `json:"needed_by,omitempty"`
}

// Usable is how far a backend can be used.
type Usable string

// How far.
const (
	Full    Usable = "usable"
	Limited Usable = "usable with limits"
	Unclear Usable = "unknown"
	No      Usable = "not usable"
)

// Verdict is what the rows together say of one backend.
type Verdict struct {
	Backend Backend  `json:"backend"`
	Usable  Usable   `json:"usable"`
	Reasons []string `json:"reasons,omitempty"`
}

// Report is the whole answer.
type Report struct {
	Rows     []Row     `json:"rows"`
	Verdicts []Verdict `json:"verdicts"`
}

// Usable reports whether any backend is.
func (r Report) Usable() bool {
	for _, v := range r.Verdicts {
		if v.Usable == Full || v.Usable == Limited {
			return true
		}
	}
	return false
}

// Answer is what the host said to one question. The zero value counts as Unknown.
type Answer struct {
	State  State  `json:"state"`
	Detail string `json:"detail,omitempty"`
}

func (a Answer) state() State {
	if a.State == "" {
		return Unknown
	}
	return a.State
}

// Facts is everything that a verdict depends on.
type Facts struct {
	Kernel       string // release, as uname -r has it
	Machine      string // as uname -m has it
	Capabilities []string
	InnerUser    bool // in a user namespace that is not the machine's: capabilities do not reach the kernel's BPF
	Seccomp      bool // a filter is set on this process

	Cgroup     Cgroup
	BPF        BPF
	Sysctls    []Sysctl
	IPv6       IPv6
	Lab        Lab
	Chains     ForeignChains
	Network    Network
	Namespaces UserNamespaces
	Captures   []Installed
}

// Has reports whether this process has a capability that counts.
func (f Facts) Has(capability string) bool {
	for _, c := range f.Capabilities {
		if c == capability {
			return !f.InnerUser
		}
	}
	return false
}

// Cgroup is what was found of control groups.
type Cgroup struct {
	V2         []Mount
	V1         int    // version 1 hierarchies that are mounted
	Own        string // of this process, as /proc/self/cgroup names it; empty: none of version 2
	PrivateNS  Answer // OK: the namespace is the host's
	Given      bool   // by --cgroup; else the own one is looked at
	Target     string // directory that was looked at
	TargetErr  string
	TargetHint string
	Writable   Answer // of the target
	Held       []HeldHook
	HeldErr    string // why the hooks could not be asked for
}

// Mount is a cgroup2 file system.
type Mount struct {
	Point    string
	Root     string
	ReadOnly bool
}

// HeldHook is a hook of the capture on which somebody else has a program, attached so that it matters to us.
type HeldHook struct {
	Cgroup    string
	Attach    string
	Exclusive bool // nobody may attach below; else ours would take the place of theirs
}

// BPF is what the kernel says of BPF.
type BPF struct {
	Syscall      Answer
	Programs     []Probe // that the capture's own programs, maps and helpers exist
	Load         Answer  // the capture's own object, loaded and let go
	BTF          Answer
	TCX          Answer
	Unprivileged string // kernel.unprivileged_bpf_disabled
	Lockdown     string
	MemlockKiB   uint64 // the limit; ^0: none
}

// Probe is one question to the kernel.
type Probe struct {
	Name   string
	Answer Answer
}

// Sysctl is a kernel parameter that a backend sets.
type Sysctl struct {
	Name, Want, Value string // Value is empty where there is no such parameter
	Why               string
	Writable          Answer
}

// IPv6 is how far the network namespace speaks it.
type IPv6 struct {
	Kernel bool
	On     bool     // on any interface
	Off    []string // interfaces on which it is switched off
}

// Network is what the network namespace holds.
type Network struct {
	Rules     []Rule
	RulesErr  string
	Routes    []int // tables of slots in which there are routes
	Listening []Listener
	AppPorts  config.PortRange // net.ipv4.ip_local_port_range
}

// Rule is a routing rule.
type Rule struct {
	Family     redirect.Family
	Priority   int
	Mark, Mask uint32
	Table      int
	Selective  bool // it has another condition than the mark
}

// Listener is a listening TCP socket.
type Listener struct {
	Port    uint16
	Process string // name of a process that has it; empty: it may not be seen
}

// ForeignChains are chains of packet filters by which other meshes redirect.
type ForeignChains struct {
	Found   []Chain
	Unknown string // why they could not be listed
}

// Chain is one chain of a packet filter.
type Chain struct {
	Flavour string // nft or legacy
	Family  string // ip, ip6, inet
	Table   string
	Name    string
}

// UserNamespaces is what decides whether a user without rights may make one.
type UserNamespaces struct {
	Max          string // user.max_user_namespaces
	Clone        string // kernel.unprivileged_userns_clone; empty: no such parameter
	AppArmor     string // kernel.apparmor_restrict_unprivileged_userns
	Unprivileged Answer // whether this process, without rights, just did
}

// Installed is a capture that is here already.
type Installed struct {
	Slot      config.Slot
	Backend   string
	Cgroup    string
	Effective bool
}
