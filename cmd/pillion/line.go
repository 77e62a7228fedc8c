// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// line carries messages and descriptors between the keeper and the proxy: one message is one packet of a SOCK_SEQPACKET pair.
type line struct{ *net.UnixConn }

// Bounds of a message. A plan has a line for each address and route of a host.
const (
	lineBytes = 1 << 20
	lineFiles = 8
)

// newLine makes a pair: one end for us, and the other for a process that is to be started.
func newLine() (*line, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "keeper"), os.NewFile(uintptr(fds[1]), "proxy")
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		_ = theirs.Close()
		return nil, nil, err
	}
	l := &line{conn.(*net.UnixConn)}
	for _, end := range []int{fds[0], fds[1]} {
		_ = unix.SetsockoptInt(end, unix.SOL_SOCKET, unix.SO_SNDBUF, lineBytes) // as much of it as the host allows
	}
	return l, theirs, nil
}

// send sends a message and copies of the files.
func (l *line) send(message any, files []*os.File) error {
	b, err := json.Marshal(message)
	if err != nil {
		return err
	}
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		rights = unix.UnixRights(fds...)
	}
	if _, _, err := l.WriteMsgUnix(b, rights, nil); err != nil {
		return fmt.Errorf("speak to the other half of `pillion run`: %w", err)
	}
	return nil
}

// receive waits for a message. The files are the caller's. io.EOF: the other end is gone.
func (l *line) receive(message any) (files []*os.File, err error) {
	b, rights := make([]byte, lineBytes), make([]byte, unix.CmsgSpace(4*lineFiles))
	n, rn, _, _, err := l.ReadMsgUnix(b, rights)
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(rights[:rn])
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return files, err
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "keeper"))
		}
	}
	return files, json.Unmarshal(b[:n], message)
}
