// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/pillionproxy/pillion/redirect/route"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ReadHost looks at the current network namespace.
func ReadHost(cgroupID uint64) (Host, error) {
	links, err := route.List(netlink.LinkList)
	if err != nil {
		return Host{}, fmt.Errorf("list interfaces: %w", err)
	}
	host := Host{
		CgroupID: cgroupID, IPv6: ipv6On("all") || ipv6On("lo"),
		FixedSysctls: errors.Is(unix.Access("/proc/sys/net/ipv4/fwmark_reflect", unix.W_OK), unix.EROFS),
	}
	for _, l := range links {
		a := l.Attrs()
		host.Interfaces = append(host.Interfaces, Interface{
			Index:    a.Index,
			Name:     a.Name,
			Loopback: a.EncapType == "loopback",
			Up:       a.Flags&1 != 0,
			Ethernet: a.EncapType == "ether",
			IPv6:     ipv6On(a.Name),
		})
	}
	return host, nil
}

// ipv6On reports whether an interface (or `all`) speaks IPv6: the file is missing where the kernel does not.
func ipv6On(name string) bool {
	b, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + name + "/disable_ipv6")
	return err == nil && strings.TrimSpace(string(b)) == "0"
}
