// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"fmt"
	"os"
	"strings"

	"github.com/pillionproxy/pillion/config"
)

// ReadSysctls reads the present values, "" where a parameter does not exist.
func ReadSysctls(list []Sysctl) []string {
	values := make([]string, len(list))
	for i, s := range list {
		values[i], _ = s.read()
	}
	return values
}

// RestoreSysctls gives back the values found before the capture, where the parameter still reads as the capture left it.
func RestoreSysctls(list []Sysctl, found []string) error {
	for i, s := range list {
		if i >= len(found) || found[i] == "" || found[i] == s.Value {
			continue
		}
		if now, err := s.read(); err != nil || now != s.Value {
			continue
		}
		if err := os.WriteFile(s.Path(), []byte(found[i]), 0); err != nil {
			return fmt.Errorf("restore %s=%s: %w", s.Name, found[i], err)
		}
	}
	return nil
}

func (s Sysctl) read() (string, error) {
	b, err := os.ReadFile(s.Path())
	return strings.TrimSpace(string(b)), err
}

// set gives the parameter its value; changed is false where it had it.
func (s Sysctl) set() (changed bool, err error) {
	now, err := s.read()
	if err != nil {
		return false, fmt.Errorf("read %s: %w", s.Name, err)
	}
	if now == s.Value {
		return false, nil
	}
	if err := os.WriteFile(s.Path(), []byte(s.Value), 0); err != nil {
		return false, &config.Fault{
			Err:  fmt.Errorf("set %s=%s: %w", s.Name, s.Value, err),
			Hint: "connections would hang without it; mount /proc/sys writable (privileged container), or set it as a sysctl of the pod",
			Exit: config.ExitUnavailable,
		}
	}
	return true, nil
}
