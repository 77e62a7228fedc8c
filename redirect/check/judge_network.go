// SPDX-License-Identifier: Apache-2.0

package check

import (
	"fmt"
	"slices"
	"strings"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
)

func sysctlRows(f Facts) []Row {
	var rows []Row
	for _, s := range f.Sysctls {
		if s.Value == "" && strings.HasPrefix(s.Name, "net.ipv6.") && !f.IPv6.Kernel {
			continue
		}
		r := Row{Group: "sysctls", What: s.Name, State: OK, Needs: needs(Better, EBPF, TProxy)}
		switch {
		case s.Value == s.Want:
			r.Detail = "is " + s.Want + " already"
		case s.Writable.state() == OK:
			r.Detail = fmt.Sprintf("%s, will be %s", s.Value, s.Want)
		default:
			r.State, r.Detail = s.Writable.state(), fmt.Sprintf("%s, must be %s: %s", s.Value, s.Want, s.Writable.Detail)
			r.Lost = s.Why
			if s.Name != "net.ipv4.tcp_rfc1337" { // a rule by ports takes the place of the others
				r.Lost = "an app's own packet mark is lost to the proxy, and peers may not use the proxy's dial ports"
			}
			if r.State == Unknown {
				r.Hint = "run it as root, or give it CAP_NET_ADMIN"
				break
			}
			r.Hint = fmt.Sprintf("in a pod: securityContext.sysctls {name: %s, value: %q} (the kubelet must allow it: --allowed-unsafe-sysctls), or a privileged init container", s.Name, s.Want)
		}
		rows = append(rows, r)
	}
	return rows
}

func ipv6Row(v IPv6) Row {
	r := Row{Group: "network", What: "IPv6", State: OK, Detail: "on"}
	switch {
	case !v.Kernel:
		r.Detail = "the kernel has none: nothing of it to capture"
	case !v.On:
		r.Detail = "switched off in this network namespace: nothing of it to capture"
	case len(v.Off) > 0:
		r.Detail = "on, but for " + list(v.Off)
	}
	return r
}

func netfilterRows(f Facts) []Row {
	var rows []Row
	families := []int{4}
	if f.IPv6.On {
		families = append(families, 6)
	}
	for _, family := range families {
		var mine []Tables
		for _, t := range f.Lab.Tables {
			if t.Family == family {
				mine = append(mine, t)
				rows = append(rows, programRow(t))
			}
		}
		for _, b := range []Backend{TProxy, Redirect} {
			rows = append(rows, backendRow(b, family, mine, f))
		}
		if r, ok := flavoursRow(family, mine); ok {
			rows = append(rows, r)
		}
	}
	return rows
}

func programRow(t Tables) Row {
	r := Row{Group: "netfilter", What: t.Program, State: OK, Detail: fmt.Sprintf("%s, %d rules in this network namespace", t.Version, t.Rules)}
	if !t.Restore {
		r.Detail += "; there is no " + t.Program + "-restore"
	}
	if missing, _ := t.lacks(func(extension) bool { return true }); len(missing) > 0 {
		r.Detail += "; without " + list(missing)
	}
	return r
}

// lacks names the extensions of some kind with which no rule could be added; open are those that could not be tried.
func (t Tables) lacks(kind func(extension) bool) (missing, open []string) {
	for _, x := range extensions {
		if !kind(x) {
			continue
		}
		switch a := t.Tried[x.name]; a.state() {
		case Missing:
			missing = append(missing, x.name)
		case Unknown:
			open = append(open, x.name)
		}
	}
	return missing, open
}

// backendRow is whether any program of a family can make the rules of a backend.
func backendRow(b Backend, family int, programs []Tables, f Facts) Row {
	r := Row{Group: "netfilter", What: fmt.Sprintf("IPv%d rules of %s", family, b), State: Missing, Needs: needs(Required, b)}
	r.Hint = "install iptables, and load the modules of what is missing (xt_NAME, nft_compat)"
	var reasons []string
	for _, t := range programs {
		missing, open := t.lacks(func(x extension) bool { return x.needs[b] == Required })
		switch {
		case !t.Restore:
			reasons = append(reasons, "no "+t.Program+"-restore")
		case len(missing) > 0:
			reasons = append(reasons, fmt.Sprintf("%s has no %s", t.Program, list(missing)))
		case len(open) > 0:
			r.State = Unknown
			reasons = append(reasons, fmt.Sprintf("%s: %s", t.Program, t.Tried[open[0]].Detail))
		default:
			r.State, r.Detail = OK, "by "+t.Program
			return r
		}
	}
	switch {
	case f.Lab.Ran.state() != OK:
		r.State, r.Detail = Unknown, "could not be tried: "+f.Lab.Ran.Detail
		r.Hint = "to try rules takes a network namespace of our own: CAP_SYS_ADMIN, or user namespaces"
	case len(programs) == 0 && family == 6:
		r.Detail, r.Hint = "no ip6tables here, and IPv6 is on: it would pass uncaptured", "install ip6tables, or switch IPv6 off in this network namespace (net.ipv6.conf.all.disable_ipv6=1)"
	case len(programs) == 0:
		r.Detail, r.Hint = "no iptables here", "install iptables"
	default:
		r.Detail = strings.Join(reasons, "; ")
	}
	return r
}

// flavoursRow warns where both flavours hold rules: each packet meets both, and who looks at one does not see the other.
func flavoursRow(family int, programs []Tables) (Row, bool) {
	var holding []string
	for _, t := range programs {
		if t.Rules > 0 {
			holding = append(holding, fmt.Sprintf("%s (%d rules)", t.Program, t.Rules))
		}
	}
	if len(holding) < 2 {
		return Row{}, false
	}
	return Row{
		Group: "netfilter", What: fmt.Sprintf("IPv%d: one flavour", family), State: Conflict, Needs: needs(Better, TProxy, Redirect),
		Detail: "rules in both: " + list(holding), Lost: "each packet meets two sets of rules, of which most tools show one",
		Hint: "move the rules of one flavour to the other, or flush those that nobody needs",
	}, true
}

func networkRows(f Facts, shared config.Shared) []Row {
	rows := append([]Row{ipv6Row(f.IPv6)}, ruleRows(f, shared.Slot)...)
	rows = append(rows, tablesRow(f, shared.Slot), portsRow(f.Network, shared), dialsRow(f.Network, shared))
	return rows
}

// tableLocal is the kernel's table of own addresses (RT_TABLE_LOCAL).
const tableLocal = 255

// ruleRows are about the routing rules of others.
func ruleRows(f Facts, slot config.Slot) []Row {
	first, last := slot.RulePriority(), slot.RulePriority()+9
	marks := Row{Group: "network", What: fmt.Sprintf("mark bits %#x", slot.Mask()), State: OK, Detail: "no other rule reads them", Needs: needs(Required, EBPF, TProxy)}
	places := Row{Group: "network", What: fmt.Sprintf("rule priorities %d-%d", first, last), State: OK, Detail: "free", Needs: needs(Required, EBPF, TProxy)}
	local := Row{Group: "network", What: "table local first", State: OK, Detail: "yes", Needs: needs(Better, EBPF, TProxy)}
	if f.Network.RulesErr != "" {
		for _, r := range []*Row{&marks, &places, &local} {
			r.State, r.Detail = Unknown, f.Network.RulesErr
		}
		return []Row{marks, places, local}
	}
	var reading, taken, before []string
	localAt := map[redirect.Family]int{}
	for _, r := range f.Network.Rules {
		if r.Mask&slot.Mask() != 0 {
			reading = append(reading, r.text())
		}
		if r.Priority >= first && r.Priority <= last {
			taken = append(taken, r.text())
		}
		if at, known := localAt[r.Family]; r.Table == tableLocal && (!known || r.Priority < at) {
			localAt[r.Family] = r.Priority
		}
		if r.Priority < first && r.Table != tableLocal && r.Mask == 0 && !r.Selective {
			before = append(before, r.text())
		}
	}
	other := fmt.Sprintf("take another slot: --slot %s, for init, proxy and check alike", freeSlot(f.Network.Rules))
	if len(reading) > 0 {
		marks.State, marks.Detail, marks.Hint = Conflict, "read by "+strings.Join(reading, "; "), other
	}
	switch {
	case len(taken) > 0:
		places.State, places.Detail, places.Hint = Conflict, "taken by "+strings.Join(taken, "; "), other
	case len(before) > 0:
		places.State, places.Detail = Conflict, "these rules take every packet before: "+strings.Join(before, "; ")
		places.Hint = fmt.Sprintf("move them behind priority %d", last)
	}
	for family, at := range localAt {
		if at >= first {
			local.State, local.Detail = Conflict, fmt.Sprintf("IPv%d: at priority %d, behind ours (Cilium does so)", family, at)
			local.Lost = "connections to other addresses of this host are captured too"
			local.Hint = fmt.Sprintf("ip -%d rule add pref 0 lookup local", family)
		}
	}
	return []Row{marks, places, local}
}

func (r Rule) text() string {
	what := "all packets"
	if r.Mask != 0 {
		what = fmt.Sprintf("fwmark %#x/%#x", r.Mark, r.Mask)
	} else if r.Selective {
		what = "some packets"
	}
	return fmt.Sprintf("IPv%d rule %d (%s, table %d)", r.Family, r.Priority, what, r.Table)
}

// freeSlot is the first slot that none of the rules disturbs, "?" where there is none.
func freeSlot(rules []Rule) string {
	for slot := config.Slot(0); slot < config.Slots; slot++ {
		disturbs := func(r Rule) bool {
			return r.Mask&slot.Mask() != 0 || r.Priority >= slot.RulePriority() && r.Priority < slot.RulePriority()+10
		}
		if !slices.ContainsFunc(rules, disturbs) {
			return slot.String()
		}
	}
	return "?"
}

// tablesRow finds routes in our tables that no capture accounts for.
func tablesRow(f Facts, slot config.Slot) Row {
	tables := []int{slot.TableCapture(), slot.TableClosed()}
	r := Row{Group: "network", What: fmt.Sprintf("tables %d, %d", tables[0], tables[1]), State: OK, Detail: "empty", Needs: needs(Better, EBPF, TProxy)}
	if !slices.ContainsFunc(f.Network.Routes, func(t int) bool { return slices.Contains(tables, t) }) {
		return r
	}
	if slices.ContainsFunc(f.Captures, func(c Installed) bool { return c.Slot == slot }) {
		r.Detail = "in use by the capture that is here"
		return r
	}
	r.State, r.Detail = Conflict, "routes of ours without a capture, or of somebody else"
	r.Lost = "routes that are there already are replaced"
	r.Hint = fmt.Sprintf("see ip route show table %d; `pillion clean` takes away what an interrupted init left", tables[0])
	return r
}

// program is the name of our processes.
const program = "pillion"

func portsRow(n Network, s config.Shared) Row {
	ours := []uint16{s.Listeners.Outbound, s.Listeners.Inbound, s.Listeners.InboundOwn, config.PortAdmin, config.PortHealth}
	r := Row{Group: "network", What: "the proxy's ports", State: OK, Detail: "free", Needs: needs(Required, EBPF, TProxy, Redirect)}
	var running, taken, unseen []string
	for _, l := range n.sorted() {
		switch {
		case !slices.Contains(ours, l.Port):
		case l.Process == program:
			running = append(running, fmt.Sprint(l.Port))
		case l.Process == "":
			unseen = append(unseen, fmt.Sprint(l.Port))
		default:
			taken = append(taken, fmt.Sprintf("%d by %s", l.Port, l.Process))
		}
	}
	switch {
	case len(taken) > 0:
		r.State, r.Detail = Conflict, list(taken)
		r.Hint = "give init and proxy other ports (--outbound-port, --inbound-port, --inbound-own-port; proxy --admin, --health)"
	case len(unseen) > 0:
		r.State, r.Detail, r.Needs = Unknown, list(unseen)+": somebody listens; by whom cannot be seen (needs CAP_SYS_PTRACE)", needs(Better, EBPF, TProxy, Redirect)
		r.Hint = "if it is a Pillion proxy, all is well"
	case len(running) > 0:
		r.Detail = "a Pillion proxy listens on " + list(running)
	}
	return r
}

func (n Network) sorted() []Listener {
	return slices.SortedFunc(slices.Values(n.Listening), func(a, b Listener) int {
		if a.Port != b.Port {
			return int(a.Port) - int(b.Port)
		}
		return strings.Compare(a.Process, b.Process)
	})
}

// dialsRow compares the ports from which the proxy dials with those of everybody else.
func dialsRow(n Network, s config.Shared) Row {
	r := Row{
		Group: "network", What: "the proxy's dial ports", State: OK, Needs: needs(Better, EBPF, TProxy, Redirect),
		Detail: fmt.Sprintf("%s and %s, apart from net.ipv4.ip_local_port_range %s", s.DialOutbound, s.DialInbound, n.AppPorts),
	}
	var shared, used []string
	for _, d := range []config.PortRange{s.DialOutbound, s.DialInbound} {
		if n.AppPorts.Last > 0 && d.Overlaps(n.AppPorts) {
			shared = append(shared, d.String())
		}
	}
	for _, l := range n.sorted() {
		if s.DialOutbound.Contains(l.Port) || s.DialInbound.Contains(l.Port) {
			used = append(used, strings.TrimSpace(fmt.Sprintf("%d %s", l.Port, l.Process)))
		}
	}
	switch {
	case len(shared) > 0:
		r.State, r.Detail = Conflict, fmt.Sprintf("%s overlap net.ipv4.ip_local_port_range %s", list(shared), n.AppPorts)
		r.Lost = "under many connections the app may find no port; by NAT, some may pass uncaptured"
		r.Hint = "keep the ranges apart: --dial-outbound and --dial-inbound, or net.ipv4.ip_local_port_range"
	case len(used) > 0:
		r.State, r.Detail = Conflict, "somebody listens among them: "+list(used)
		r.Lost = "those ports are never dialled from, and answers to them may be taken for the proxy's"
		r.Hint = "give init and proxy other ranges: --dial-outbound, --dial-inbound"
	}
	return r
}

func neighbourRows(f Facts) []Row {
	return []Row{meshRow(f), capturesRow(f.Captures)}
}

func meshRow(f Facts) Row {
	r := Row{Group: "neighbours", What: "another mesh", State: OK, Detail: "none is seen here", Needs: needs(Better, EBPF, TProxy, Redirect)}
	var seen []string
	say := func(s string) {
		if !slices.Contains(seen, s) {
			seen = append(seen, s)
		}
	}
	for _, c := range f.Chains.Found {
		name := c.Name
		if meshOf(Chain{Name: name}) == "" {
			name = "table " + c.Table
		}
		say(fmt.Sprintf("%s: %s (%s %s)", meshOf(c), name, c.Flavour, c.Family))
	}
	for _, l := range f.Network.sorted() {
		if mesh := meshAt(l.Port); mesh != "" {
			say(strings.TrimSpace(fmt.Sprintf("%s: listens on %d %s", mesh, l.Port, l.Process)))
		}
	}
	switch {
	case len(seen) > 0:
		const shown = 6
		if len(seen) > shown {
			seen = append(seen[:shown], fmt.Sprintf("and %d more", len(seen)-shown))
		}
		r.State, r.Detail = Conflict, strings.Join(seen, "; ")
		r.Lost = "its proxy and ours would both take the connections"
		r.Hint = "take its injection off this pod; or keep both, with --exclude-outbound-ports and --exclude-uids for its proxy"
	case f.Chains.Unknown != "":
		r.State, r.Detail = Unknown, "packet filters cannot be listed: "+f.Chains.Unknown
	}
	return r
}

func capturesRow(captures []Installed) Row {
	r := Row{Group: "neighbours", What: "captures here", State: OK, Detail: "none"}
	var all []string
	for _, c := range captures {
		state := "effective"
		if !c.Effective {
			state = "NOT effective"
		}
		where := c.Cgroup
		if where == "" {
			where = "of a running command"
		}
		all = append(all, fmt.Sprintf("slot %s, %s, %s, %s", c.Slot, c.Backend, where, state))
	}
	if len(all) > 0 {
		r.Detail = strings.Join(all, "; ")
	}
	return r
}

func namespaceRows(f Facts) []Row {
	n := f.Namespaces
	r := Row{Group: "rootless", What: "user namespaces", State: OK, Detail: "allowed to users without rights", Needs: needs(Required, Rootless)}
	switch {
	case n.Max == "0":
		r.State, r.Detail, r.Hint = Missing, "user.max_user_namespaces is 0", "sysctl -w user.max_user_namespaces=10000"
	case n.Clone == "0":
		r.State, r.Detail, r.Hint = Missing, "kernel.unprivileged_userns_clone is 0", "sysctl -w kernel.unprivileged_userns_clone=1"
	case n.AppArmor == "1" && n.Unprivileged.state() != OK:
		r.State, r.Detail = Missing, "kernel.apparmor_restrict_unprivileged_userns is 1"
		r.Hint = "give pillion an AppArmor profile with `userns,`, or sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
	case n.Unprivileged.State == OK:
		r.Detail = "one was just made"
	case n.Unprivileged.State == Unknown:
		r.State, r.Detail, r.Hint = Missing, n.Unprivileged.Detail, "a seccomp filter or a security module forbids it"
	case n.Max == "":
		r.State, r.Detail = Unknown, "user.max_user_namespaces cannot be read here"
	}
	filter := Row{
		Group: "rootless", What: "nf_tables", State: f.Lab.Rootless.state(), Detail: f.Lab.Rootless.Detail, Needs: needs(Required, Rootless),
		Hint: "the kernel needs nf_tables with tproxy and socket: modprobe -a nft_tproxy nft_socket",
	}
	if f.Lab.Ran.state() != OK {
		filter.Detail, filter.Hint = "could not be tried: "+f.Lab.Ran.Detail, ""
	}
	return []Row{r, filter}
}
