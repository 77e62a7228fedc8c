// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"bytes"
	"encoding/json"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/pillionproxy/pillion/config"
)

// The policy travels with the capture: as JSON in a map that no program reads, bound to the one that marks. It is gone
// with that program.
const policyMap = "policy"

// bindPolicy leaves the policy with a program. It takes Linux 5.10 (BPF_PROG_BIND_MAP).
func bindPolicy(p *ebpf.Program, policy config.Capture) error {
	text, err := json.Marshal(policy)
	if err != nil {
		return fmt.Errorf("write the policy: %w", err)
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: policyMap, Type: ebpf.Array, KeySize: 4, ValueSize: uint32(len(text)), MaxEntries: 1})
	if err != nil {
		return fmt.Errorf("write the policy: %w", err)
	}
	defer m.Close()
	if err := m.Put(uint32(0), text); err != nil {
		return fmt.Errorf("write the policy: %w", err)
	}
	if err := m.Freeze(); err != nil {
		return fmt.Errorf("write the policy: %w", err)
	}
	if err := p.BindMap(m); err != nil {
		return fmt.Errorf("leave the policy with the capture: %w", err)
	}
	return nil
}

// policyOf reads back what bindPolicy left with the program of that id. It takes CAP_SYS_ADMIN.
func policyOf(program uint32) (config.Capture, error) {
	m, err := mapOf(program, policyMap)
	if err != nil {
		return config.Capture{}, err
	}
	defer m.Close()
	var policy config.Capture
	text, err := m.LookupBytes(uint32(0))
	if err == nil {
		err = json.Unmarshal(bytes.TrimRight(text, "\x00"), &policy)
	}
	if err != nil {
		return policy, fmt.Errorf("read the policy of the capture: %w", err)
	}
	return policy, nil
}
