// SPDX-License-Identifier: Apache-2.0

package rootless

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/pillionproxy/pillion/config"
	"golang.org/x/sys/unix"
)

// switches are those by which a host forbids users to make user namespaces. Each is a kernel parameter and the value that forbids.
var switches = []struct{ name, forbids, allow string }{
	{"kernel.unprivileged_userns_clone", "0", "1"},                 // Debian's, off since Debian 11 only where somebody turned it off
	{"user.max_user_namespaces", "0", "10000"},                     // Documentation/admin-guide/sysctl/user.rst
	{"user.max_net_namespaces", "0", "10000"},                      // the same
	{"kernel.apparmor_restrict_unprivileged_userns", "1", "0"},     // Ubuntu's, since 23.10
	{"kernel.apparmor_restrict_unprivileged_unconfined", "1", "0"}, // the same
}

const restricted = "this host lets no user have rights in a namespace of their own (a security module may say so: AppArmor, SELinux, a container's seccomp profile); run it with sudo: `sudo pillion run`"

// Explain says of an error of making the namespaces which switch of this host forbids it, and who may turn it.
func Explain(err error) error {
	hint := restricted
	if errors.Is(err, unix.EAGAIN) {
		hint = "this user has as many processes as it may have (ulimit -u)"
	}
	for _, s := range switches {
		b, rerr := os.ReadFile("/proc/sys/" + strings.ReplaceAll(s.name, ".", "/"))
		if rerr == nil && strings.TrimSpace(string(b)) == s.forbids {
			hint = fmt.Sprintf("%s is %s on this host: whoever runs it may allow it (sudo sysctl -w %s=%s); or run it with sudo: `sudo pillion run`", s.name, s.forbids, s.name, s.allow)
			break
		}
	}
	exit := config.ExitUnavailable
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		exit = config.ExitNoPerm
	}
	return &config.Fault{Err: fmt.Errorf("make a user and a network namespace: %w", err), Hint: hint, Exit: exit}
}
