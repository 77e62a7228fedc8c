// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	"github.com/pillionproxy/pillion/config"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// batch is several requests to rtnetlink in one message: the kernel works through all of them before the system call
// returns (netlink_rcv_skb), whatever happens to the caller.
type batch struct {
	bytes    []byte
	requests int
}

func (b *batch) add(kind, flags int, data ...nl.NetlinkRequestData) {
	r := nl.NewNetlinkRequest(kind, flags|unix.NLM_F_ACK)
	b.requests++
	r.Seq = uint32(b.requests)
	for _, d := range data {
		r.AddData(d)
	}
	b.bytes = append(b.bytes, r.Serialize()...) // its length is a multiple of four, as all of it is
}

// send sends the requests and waits for the answer to each. Its error is that of the first which failed.
func (b *batch) send() error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer unix.Close(fd)
	if err := unix.Sendto(fd, b.bytes, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("send to netlink: %w", err)
	}
	var failed error
	buf := make([]byte, 8192)
	for answers := 0; answers < b.requests; {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("receive from netlink: %w", err)
		}
		messages, err := parseAnswers(buf[:n])
		if err != nil {
			return err
		}
		for _, errno := range messages {
			answers++
			if failed == nil && errno != 0 {
				failed = errno
			}
		}
	}
	if errors.Is(failed, unix.EPERM) {
		return &config.Fault{Err: failed, Hint: "it takes CAP_NET_ADMIN in the network namespace", Exit: config.ExitNoPerm}
	}
	return failed
}

// parseAnswers reads the error codes of NLMSG_ERROR messages, 0 for success.
func parseAnswers(b []byte) (codes []unix.Errno, err error) {
	messages, err := syscall.ParseNetlinkMessage(b)
	if err != nil {
		return nil, fmt.Errorf("read the answer of netlink: %w", err)
	}
	for _, m := range messages {
		if m.Header.Type == unix.NLMSG_ERROR && len(m.Data) >= 4 {
			codes = append(codes, unix.Errno(-int32(binary.NativeEndian.Uint32(m.Data))))
		}
	}
	return codes, nil
}
