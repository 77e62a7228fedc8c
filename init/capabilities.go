// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"fmt"
	"strings"

	"github.com/pillionproxy/pillion/config"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// RequireCapabilities reports which of the two capabilities of the backend ebpf this process lacks.
func RequireCapabilities() error { return requireCapabilities(cap.BPF, cap.NET_ADMIN) }

func requireCapabilities(need ...cap.Value) error {
	have := cap.GetProc()
	var missing, all []string
	for _, c := range need {
		name := strings.ToUpper(c.String())
		all = append(all, name)
		if ok, err := have.GetFlag(cap.Effective, c); err != nil || !ok {
			missing = append(missing, name)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return &config.Fault{
		Err:  fmt.Errorf("missing %s", strings.Join(missing, " and ")),
		Hint: fmt.Sprintf("run it as root (sudo), or give the process %s", strings.Join(all, " and ")),
		Exit: config.ExitNoPerm,
	}
}
