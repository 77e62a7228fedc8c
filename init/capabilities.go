// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"fmt"
	"strings"

	"github.com/pillionproxy/pillion/config"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// RequireCapabilities reports which of the two capabilities of the init step this process lacks.
func RequireCapabilities() error {
	have := cap.GetProc()
	var missing []string
	for _, c := range []struct {
		value cap.Value
		name  string
	}{{cap.BPF, "CAP_BPF"}, {cap.NET_ADMIN, "CAP_NET_ADMIN"}} {
		if ok, err := have.GetFlag(cap.Effective, c.value); err != nil || !ok {
			missing = append(missing, c.name)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return &config.Fault{
		Err:  fmt.Errorf("missing %s", strings.Join(missing, " and ")),
		Hint: "run it as root (sudo), or give the process CAP_BPF and CAP_NET_ADMIN",
		Exit: config.ExitNoPerm,
	}
}
