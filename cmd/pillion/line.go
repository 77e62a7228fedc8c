// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// line carries messages and descriptors between the keeper and the proxy: one message is one packet of a SOCK_SEQPACKET pair. What
// is too long for that, as the routes of a router or the arguments of a command may be, is in a file of memory beside it.
type line struct{ *net.UnixConn }

const (
	packetBytes = 16 << 10 // every host lets a socket send so much
	lineFiles   = 8        // in one packet
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
	return &line{conn.(*net.UnixConn)}, theirs, nil
}

// send sends a message and copies of the files.
func (l *line) send(message any, files []*os.File) error {
	b, err := json.Marshal(message)
	if err != nil {
		return err
	}
	if len(b) > packetBytes {
		long, err := memory(b)
		if err != nil {
			return err
		}
		defer long.Close()
		b, files = inMemory, append([]*os.File{long}, files...)
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

// receive waits for a message. The files are the caller's, and close on exec (package net sees to it). io.EOF: the other end is
// gone.
func (l *line) receive(message any) (files []*os.File, err error) {
	b, rights := make([]byte, packetBytes), make([]byte, unix.CmsgSpace(4*lineFiles))
	n, rn, _, _, err := l.ReadMsgUnix(b, rights)
	if err == nil && n == 0 || errors.Is(err, unix.ECONNRESET) { // it ended, or was killed with something unread
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
			files = append(files, os.NewFile(uintptr(fd), "keeper"))
		}
	}
	b = b[:n]
	if string(b) == string(inMemory) && len(files) > 0 {
		b, err = io.ReadAll(files[0])
		_ = files[0].Close()
		files = files[1:]
		if err != nil {
			return files, err
		}
	}
	return files, json.Unmarshal(b, message)
}

// inMemory is the packet of a message that is in its first file.
var inMemory = []byte("in memory")

// memory is a file with a content, read from its start.
func memory(content []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("pillion", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "message")
	if _, err := f.WriteAt(content, 0); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}
