// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/pillionproxy/pillion/bpf"
	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
)

// note is what an installer leaves behind for whoever comes later: which capture this is, and what the host was like
// before. It is the name of each of our tc filters (up to 255 bytes, readable without any capability, gone with the
// network namespace), so that losing one interface loses nothing.
//
//	pillion slot=0 plan=8d2f6a01 cgroup=4711 hooks=12,13,14,15,16,17 ports=16001,16006,16007 down=hold,hold dial=27000-32767 fixed=false clsact=true sysctl=0,0,0,0
type note struct {
	Slot     config.Slot
	Plan     string   // hash of everything that the programs depend on
	CgroupID uint64   // the captured cgroup
	Hooks    []uint32 // ids of the programs on it, in the order of the plan
	Ports    config.Listeners
	Down     [2]config.FailureMode // outbound, inbound
	Dial     config.PortRange      // of the proxy's dials to the app
	Fixed    bool                  // the sysctls could not be written: the port rule is in their place
	Clsact   bool                  // the interface's clsact qdisc is ours to remove
	Sysctls  []string              // values found, in the order of the list; "" where there was no such parameter
}

const notePrefix = "pillion "

func (n note) String() string {
	ids := make([]string, len(n.Hooks))
	for i, id := range n.Hooks {
		ids[i] = strconv.FormatUint(uint64(id), 10)
	}
	return fmt.Sprintf("%sslot=%d plan=%s cgroup=%d hooks=%s ports=%d,%d,%d down=%s,%s dial=%s fixed=%t clsact=%t sysctl=%s", notePrefix, n.Slot, n.Plan,
		n.CgroupID, strings.Join(ids, ","), n.Ports.Outbound, n.Ports.Inbound, n.Ports.InboundOwn, n.Down[0], n.Down[1],
		n.Dial, n.Fixed, n.Clsact, strings.Join(n.Sysctls, ","))
}

// parseNote reads the name of a filter; ok is false where it is none of ours.
func parseNote(name string) (n note, ok bool) {
	rest, ok := strings.CutPrefix(name, notePrefix)
	if !ok {
		return n, false
	}
	for _, field := range strings.Fields(rest) {
		key, value, _ := strings.Cut(field, "=")
		switch key {
		case "slot":
			v, err := strconv.ParseUint(value, 10, 8)
			if err != nil || v >= config.Slots {
				return n, false
			}
			n.Slot = config.Slot(v)
		case "plan":
			n.Plan = value
		case "cgroup":
			n.CgroupID, _ = strconv.ParseUint(value, 10, 64)
		case "hooks":
			for _, s := range strings.Split(value, ",") {
				if id, err := strconv.ParseUint(s, 10, 32); err == nil {
					n.Hooks = append(n.Hooks, uint32(id))
				}
			}
		case "ports":
			fmt.Sscanf(value, "%d,%d,%d", &n.Ports.Outbound, &n.Ports.Inbound, &n.Ports.InboundOwn)
		case "down":
			out, in, _ := strings.Cut(value, ",")
			_, _ = n.Down[0].Set(out), n.Down[1].Set(in)
		case "clsact":
			n.Clsact = value == "true"
		case "fixed":
			n.Fixed = value == "true"
		case "dial":
			_ = n.Dial.Set(value)
		case "sysctl":
			n.Sysctls = strings.Split(value, ",")
		}
	}
	return n, true
}

// planHash covers what the loaded programs depend on: the policy and the object. Interfaces, which come and go, are not
// in it.
func planHash(plan redirect.Plan, without bpf.CaptureCure) (string, error) {
	spec, err := bpf.LoadCapture()
	if err != nil {
		return "", err
	}
	h := sha256.New()
	policy := plan.Policy
	policy.Cgroup = "" // known by its id
	if err := json.NewEncoder(h).Encode(struct {
		Policy          config.Capture
		ExcludedCgroups []uint64
		Without         bpf.CaptureCure
	}{policy, plan.ExcludedCgroups, without}); err != nil {
		return "", err
	}
	for _, name := range programNames(spec.Programs) {
		tag, err := spec.Programs[name].Tag()
		if err != nil {
			return "", fmt.Errorf("hash program %s: %w", name, err)
		}
		h.Write([]byte(tag))
	}
	return hex.EncodeToString(h.Sum(nil)[:4]), nil
}

func programNames[V any](programs map[string]V) []string {
	names := make([]string, 0, len(programs))
	for name := range programs {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
