// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"errors"
	"fmt"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
)

// Names of the backends.
const (
	TProxy   = "tproxy"
	Redirect = "redirect"
)

// Plan says what a backend does for a policy on a host. Its error names everything of the policy that the backend cannot
// honour.
func Plan(backend string, policy config.Capture, host redirect.Host, tools Tools) (redirect.Plan, error) {
	families := []redirect.Family{redirect.IPv4}
	if host.IPv6 {
		families = append(families, redirect.IPv6)
	}
	if err := refuse(backend, policy, tools); err != nil {
		return redirect.Plan{}, err
	}
	p := redirect.Plan{Backend: backend, Lifetime: redirect.Persistent, Policy: policy}
	for _, f := range families {
		tool, ok := tools.Of[f]
		if !ok {
			return redirect.Plan{}, missingTool(f, tools.Missing[f])
		}
		if backend == TProxy {
			p.Tables = append(p.Tables, tproxyTables(policy, tool, tools.Tracked)...)
		} else {
			p.Tables = append(p.Tables, redirectTables(policy, tool)...)
		}
	}
	if backend == TProxy {
		p.Sysctls = sysctlsFor(host, tools.Tracked)
		for _, f := range families {
			p.Routes = append(p.Routes, redirect.MarkRoutes(policy.Slot, f, host.Interfaces)...)
		}
		for _, f := range families {
			p.Rules = append(p.Rules, redirect.MarkRules(policy.Slot, f)...)
		}
	}
	return p, nil
}

// missingTool: a family without its packet filter would pass uncaptured.
func missingTool(f redirect.Family, cause error) error {
	return &config.Fault{
		Err:  fmt.Errorf("IPv%d would pass uncaptured: %w", f, cause),
		Hint: "install iptables (with ip6tables), or switch the family off in this network namespace (sysctl net.ipv6.conf.all.disable_ipv6=1)",
		Exit: config.ExitUnavailable,
	}
}

// refuse names what the backend cannot honour.
func refuse(backend string, policy config.Capture, tools Tools) error {
	var errs []error
	no := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if policy.Cgroup != "" {
		no("--cgroup %s: packet filters do not know whose a listener is, so %s captures the whole network namespace", policy.Cgroup, backend)
	}
	if len(policy.Selection.ExcludeCgroups) > 0 {
		no("--exclude-cgroups: packet filters do not know whose a listener is")
	}
	for _, d := range []struct {
		flag string
		mode config.FailureMode
	}{{"--on-proxy-down", policy.OnProxyDown}, {"--on-proxy-down-inbound", policy.OnProxyDownInbound}} {
		switch {
		case d.mode == config.Open:
			no("%s open: packet filters cannot look for the proxy before they decide", d.flag)
		case d.mode == config.Closed && backend == TProxy:
			no("%s closed: TPROXY drops what nobody listens for, so a connection waits (hold)", d.flag)
		}
	}
	if backend == TProxy && !tools.Tracked && (!policy.Selection.UIDs.IsZero() || !policy.Selection.GIDs.IsZero()) {
		no("--include-uids, --exclude-uids, --include-gids, --exclude-gids: a socket that was closed has no owner any more, and without connection tracking (nf_conntrack is not loaded) its last packets could not be told apart")
	}
	if len(errs) == 0 {
		return nil
	}
	hint := "take --backend ebpf, or leave the flag out"
	if backend == TProxy {
		hint = "take --backend ebpf or redirect, or leave the flag out"
	}
	return &config.Fault{Err: fmt.Errorf("the backend %s cannot do this: %w", backend, errors.Join(errs...)), Hint: hint, Exit: config.ExitConfig}
}
