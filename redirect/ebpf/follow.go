// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/pillionproxy/pillion/redirect"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// what changes when a part of the capture may be gone, or one may be wanted: interfaces, addresses, routes, rules, tc.
var followed = []uint{
	unix.RTNLGRP_LINK, unix.RTNLGRP_TC, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
	unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
}

// Follow mends the capture whenever something of the network namespace changes, until ctx is done: routes that went with
// an interface, interfaces that come, rules and filters that somebody removed. It compares before it changes anything, so
// that its own changes do not wake it for ever. It must not run at the same time as Close.
func (c *Capture) Follow(ctx context.Context, log *slog.Logger) error {
	s, err := nl.Subscribe(unix.NETLINK_ROUTE, followed...)
	if err != nil {
		return fmt.Errorf("follow the network namespace: %w", err)
	}
	defer s.Close()
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fmt.Errorf("follow the network namespace: %w", err)
	}
	defer unix.Close(wake)
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(woken)
		unix.Write(wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	})
	defer func() {
		if !stop() {
			<-woken
		}
	}()
	for {
		mended, err := c.mend(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			log.Error("the capture could not be mended", "error", err)
		case len(mended) > 0:
			log.Info("the capture was mended", "parts", mended)
		}
		if err := waitForChange(s, wake); err != nil {
			return fmt.Errorf("follow the network namespace: %w", err)
		}
		if ctx.Err() != nil {
			return nil
		}
	}
}

// waitForChange returns when there are messages, which it takes, or when wake is readable. What the messages say does not
// matter, nor that some were lost: everything is looked at.
func waitForChange(s *nl.NetlinkSocket, wake int) error {
	fds := []unix.PollFd{{Fd: int32(s.GetFd()), Events: unix.POLLIN}, {Fd: int32(wake), Events: unix.POLLIN}}
	for timeout := -1; ; timeout = 0 {
		n, err := unix.Poll(fds, timeout)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 || fds[1].Revents != 0 {
			return nil
		}
		if _, _, err := s.Receive(); err != nil && !errors.Is(err, unix.ENOBUFS) {
			return err
		}
	}
}

// mend adds what is missing of the capture as it should be now, and says what that was.
func (c *Capture) mend(ctx context.Context) ([]string, error) {
	release, err := redirect.Lock(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	host, err := redirect.ReadHost(c.in.dir.ID)
	if err != nil {
		return nil, err
	}
	c.in.Changed = nil
	c.in.plan = Plan(c.in.plan.Policy, host, redirect.Held)
	found, err := foundSysctls()
	if err != nil {
		return nil, err
	}
	err = errors.Join(c.in.holdFilters(), c.in.sysctls(found), c.in.routes(), c.in.rules())
	return c.in.Changed, err
}
