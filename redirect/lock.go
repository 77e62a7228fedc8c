// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// lockName is an abstract Unix address: it belongs to the network namespace, needs no file system, and is free again
// the moment its holder is gone, however it went.
const lockName = "@pillion/lock"

// Lock waits until the caller is the only one that changes the capture of this network namespace. The release function
// may be called again.
func Lock(ctx context.Context) (release func(), err error) {
	for {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: lockName, Net: "unix"})
		if err == nil {
			return func() { l.Close() }, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return nil, fmt.Errorf("lock the network namespace: %w", err)
		}
		if err := waitForHolder(ctx); err != nil {
			return nil, fmt.Errorf("lock the network namespace: another pillion is changing it: %w", err)
		}
	}
}

// waitForHolder returns when the present holder is gone: the connection that it never accepts ends with it.
func waitForHolder(ctx context.Context) error {
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: lockName, Net: "unix"})
	if errors.Is(err, unix.EAGAIN) { // more waiters than its backlog
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
			return nil
		}
	}
	if err != nil {
		return ctx.Err() // it went in this moment
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	c.Read(make([]byte, 1))
	return ctx.Err()
}
