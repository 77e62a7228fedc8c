// SPDX-License-Identifier: Apache-2.0

package rootless

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/route"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Install does what the plan says in the network namespace of this process, which must be a fresh one of its own.
func (p Plan) Install() error {
	for _, s := range p.Sysctls {
		// Where /proc/sys may not be written, as in some containers, it is as fast as the host's way of congestion control, and
		// ::1 is there, at which nobody listens.
		_ = os.WriteFile(s.Path(), []byte(s.Value), 0)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return denied(fmt.Errorf("set lo up: %w", err))
	}
	for _, a := range p.Addresses {
		// No duplicate of it is looked for: it would be unusable meanwhile.
		add := &netlink.Addr{IPNet: prefix(netip.PrefixFrom(a, a.BitLen())), Flags: unix.IFA_F_NODAD}
		if err := netlink.AddrAdd(lo, add); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add the address %s to lo: %w", a, err)
		}
	}
	if err := p.awaitAddresses(); err != nil {
		return err
	}
	for _, r := range p.Routes {
		add := &netlink.Route{
			LinkIndex: lo.Attrs().Index, Dst: prefix(r.To), Src: r.Source.AsSlice(), Type: unix.RTN_LOCAL,
			Scope: netlink.SCOPE_HOST, Table: unix.RT_TABLE_MAIN,
		}
		if err := netlink.RouteAdd(add); err != nil {
			return fmt.Errorf("add a local route to %s from %s: %w", r.To, r.Source, err)
		}
	}
	return filterAll(p)
}

// filterAll sets the rules of every family that the kernel has.
func filterAll(p Plan) error {
	if err := p.filter(redirect.IPv4); err != nil {
		return err
	}
	if _, err := os.Stat("/proc/self/net/if_inet6"); err != nil {
		return nil
	}
	return p.filter(redirect.IPv6)
}

// The kernel makes an IPv6 address usable some time after it was added, whether or not it looks for a duplicate
// (addrconf_dad_completed in net/ipv6/addrconf.c): until then nothing can be sent from it.
const (
	usableTime = 10 * time.Second
	usableStep = time.Millisecond
)

// awaitAddresses waits until every IPv6 address has its route in the table `local`.
func (p Plan) awaitAddresses() error {
	for end := time.Now().Add(usableTime); ; time.Sleep(usableStep) {
		routes, err := route.List(func() ([]netlink.Route, error) {
			return netlink.RouteListFiltered(unix.AF_INET6, &netlink.Route{Table: unix.RT_TABLE_LOCAL}, netlink.RT_FILTER_TABLE)
		})
		if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
			return fmt.Errorf("list the local routes: %w", err)
		}
		missing := slices.DeleteFunc(slices.Clone(p.Addresses), func(a netip.Addr) bool {
			return a.Is4() || slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.Dst != nil && r.Dst.IP.Equal(a.AsSlice()) })
		})
		if len(missing) == 0 {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("the addresses %v do not become usable", missing)
		}
	}
}

// Try sets the packet filter of a host without addresses in the network namespace of this process, which must be a fresh one of
// its own.
func Try() error {
	return filterAll(MakePlan(Host{}, Ports{TCP: 1, UDP: 1}))
}

func prefix(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// filter sets the rules of a family, all of them or none.
func (p Plan) filter(f redirect.Family) error {
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("speak to nf_tables: %w", err)
	}
	conn.AddTable(table(f))
	for _, c := range chains(f) {
		conn.AddChain(c)
		for _, r := range p.Rules {
			if r.Family != f || r.Chain != c.Name {
				continue
			}
			exprs, err := r.compile(conn, table(f))
			if err != nil {
				return fmt.Errorf("rule %q: %w", r.Text, err)
			}
			conn.AddRule(&nftables.Rule{Table: table(f), Chain: c, Exprs: exprs})
		}
	}
	if err := conn.Flush(); err != nil {
		return &config.Fault{
			Err:  fmt.Errorf("set the packet filter of the command's namespace (nf_tables, %s): %w", nftName(f), err),
			Hint: "the kernel needs nf_tables with the expressions tproxy and socket (modules nft_tproxy, nft_socket), which `sudo modprobe -a nft_tproxy nft_socket` loads; or run it with sudo",
			Exit: config.ExitUnavailable,
		}
	}
	return nil
}

// compile gives a rule's expressions; sets that it needs are made beside it.
func (r Rule) compile(conn *nftables.Conn, t *nftables.Table) (exprs []expr.Any, err error) {
	for _, p := range r.parts {
		exprs = append(exprs, p.exprs...)
		if len(p.in) == 0 {
			continue
		}
		set := &nftables.Set{Table: t, Anonymous: true, Constant: true, Interval: true, KeyType: nftables.TypeIPAddr}
		if r.Family == redirect.IPv6 {
			set.KeyType = nftables.TypeIP6Addr
		}
		if err := conn.AddSet(set, intervals(p.in)); err != nil {
			return nil, err
		}
		exprs = append(exprs, &expr.Lookup{SourceRegister: register, SetName: set.Name, SetID: set.ID, Invert: p.negate})
	}
	return exprs, nil
}

// denied explains what is refused in a namespace of our own.
func denied(err error) error {
	if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) {
		return err
	}
	return &config.Fault{
		Err:  err,
		Hint: restricted,
		Exit: config.ExitNoPerm,
	}
}
