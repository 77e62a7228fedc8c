// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"errors"
	"fmt"
	"log/slog"
	"os"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// DropPrivileges leaves the process, with all its threads, CAP_NET_RAW, if it has it: transparent sockets, and packet marks
// since Linux 5.17, need it, and nothing else of the proxy needs any other. On an older kernel CAP_NET_ADMIN stays too, if
// it is there beside it: without it the marks of apps are lost. A process without CAP_NET_RAW is left nothing; whether it
// can go on so is for its listeners to tell. Nothing that the process may execute will get anything back.
//
// A step that fails leaves what is done done.
func DropPrivileges(log *slog.Logger) error {
	had := cap.GetProc()
	if has(had, cap.Effective, cap.SETPCAP) { // else the bounding set stays, but no_new_privs makes it idle
		if err := dropBounding(); err != nil {
			return fmt.Errorf("drop the capability bounding set: %w", err)
		}
	}
	if _, err := cap.Prctlw(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	if !has(had, cap.Permitted, cap.NET_RAW) {
		return setCapabilities(nil, nil)
	}
	permitted := []cap.Value{cap.NET_RAW}
	if has(had, cap.Permitted, cap.NET_ADMIN) && !canMark(permitted) {
		log.Warn("keeping CAP_NET_ADMIN: before Linux 5.17, packet marks take it")
		permitted = append(permitted, cap.NET_ADMIN)
	}
	return setCapabilities(permitted, permitted)
}

func has(s *cap.Set, flag cap.Flag, v cap.Value) bool {
	on, err := s.GetFlag(flag, v)
	return err == nil && on
}

// dropBounding empties the bounding set but for CAP_NET_RAW.
func dropBounding() error {
	for v := range cap.MaxBits() {
		if v == cap.NET_RAW {
			continue
		}
		if in, err := cap.GetBound(v); err != nil || !in {
			continue
		}
		if err := cap.DropBound(v); err != nil {
			return fmt.Errorf("%s: %w", v, err)
		}
	}
	return nil
}

// canMark tries to set a packet mark with nothing but these capabilities in effect.
func canMark(effective []cap.Value) bool {
	if err := setCapabilities(append(effective, cap.NET_ADMIN), effective); err != nil {
		return false
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return !errors.Is(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, 1), os.ErrPermission)
}

// setCapabilities leaves these in the permitted and the effective set, and empties the inheritable and with it the
// ambient set.
func setCapabilities(permitted, effective []cap.Value) error {
	s := cap.NewSet()
	if err := errors.Join(
		s.SetFlag(cap.Permitted, true, permitted...),
		s.SetFlag(cap.Effective, true, effective...),
	); err != nil {
		return err
	}
	if err := s.SetProc(); err != nil {
		return fmt.Errorf("set capabilities to %s: %w", s, err)
	}
	return nil
}
