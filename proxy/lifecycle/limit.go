// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// reserve is how many descriptors are not for connections: listeners, metrics and admin clients, the logs, the runtime's epoll, and
// those needed to accept a connection only to reset it; and, with one event loop for each processor, two for each loop, and two for
// each of their pipes, of which there are 32, or one for each loop.
func reserve() int {
	loops := runtime.GOMAXPROCS(0)
	return 96 + 2*loops + 2*max(32, loops)
}

// ConnectionLimit is how many connections a server may have: asked, or, if that is 0 or more than fits, as many as fit into
// the process's descriptor limit at two descriptors each. In the last case warning says so.
//
// The soft limit is not raised here, because the Go runtime has raised it to the hard one already (and gives the old one
// back to children, which it would not if we set it ourselves).
func ConnectionLimit(asked int) (limit int, warning string) {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		l.Cur = 1024 // cannot happen; the usual soft limit
	}
	fits := int(min(l.Cur, 1<<24))
	fits = max((fits-min(reserve(), fits/2))/2, 1)
	switch {
	case asked == 0:
		return fits, ""
	case asked > fits:
		return fits, "the descriptor limit allows fewer connections than --max-connections: raise RLIMIT_NOFILE (LimitNOFILE= in systemd)"
	default:
		return asked, ""
	}
}
