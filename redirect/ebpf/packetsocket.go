// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/pillionproxy/pillion/redirect"
	"golang.org/x/sys/unix"
)

// inspectPacketSockets reports packet sockets that take IP packets of their own protocol (some DHCP clients do; tcpdump
// takes all protocols and does no harm). For them the kernel clones each packet, and the clone has lost the socket that
// tc assigned: inbound connections on that interface pass uncaptured, and on lo outbound ones hang.
func inspectPacketSockets() []redirect.Item {
	f, err := os.Open("/proc/thread-self/net/packet")
	if err != nil {
		return nil // no packet sockets in this kernel
	}
	defer f.Close()
	var items []redirect.Item
	for lines := bufio.NewScanner(f); lines.Scan(); {
		index, ok := parsePacketSocket(lines.Text())
		if !ok {
			continue
		}
		where := "every interface"
		if link, err := net.InterfaceByIndex(index); err == nil {
			where = link.Name
		}
		items = append(items, redirect.Item{
			Kind: "packet", Name: where, State: redirect.StateWrong,
			Detail: "a program reads IP packets there (AF_PACKET, ETH_P_IP or ETH_P_IPV6), which makes the capture lose connections; end it",
		})
	}
	return items
}

// parsePacketSocket reads a line of /proc/net/packet: sk RefCnt Type Proto Iface R Rmem User Inode. ok is true for a
// socket of one of the two protocols that is running; index 0 is every interface.
func parsePacketSocket(line string) (index int, ok bool) {
	fields := strings.Fields(line)
	if len(fields) < 6 || fields[5] != "1" {
		return 0, false
	}
	protocol, err := strconv.ParseUint(fields[3], 16, 16)
	if err != nil || protocol != unix.ETH_P_IP && protocol != unix.ETH_P_IPV6 {
		return 0, false
	}
	if _, err := fmt.Sscan(fields[4], &index); err != nil {
		return 0, false
	}
	return index, true
}
