// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

func TestDefaultsAreValid(t *testing.T) {
	if err := errors.Join(DefaultCapture().Validate(), DefaultProxy().Validate()); err != nil {
		t.Error(err)
	}
}

func TestValidateReportsEveryProblem(t *testing.T) {
	c := DefaultCapture()
	c.Slot = Slots
	c.Listeners = Listeners{Outbound: 20000, Inbound: 0, InboundOwn: 20000}
	c.DialInbound = c.DialOutbound
	c.ProxyUID = 0
	p := DefaultProxy()
	p.ConnectTimeout, p.IdleTimeout, p.DrainTimeout, p.MaxConnections = 0, -1, -1, -1
	p.Admin = netip.MustParseAddrPort("0.0.0.0:16000")
	p.LogFormat, p.Listen = "xml", "everywhere"
	got := errors.Join(c.Validate(), p.Validate()).Error()
	for _, want := range []string{
		"slot 8", "--inbound-port", "must differ", "contains the listener port 20000", "must not overlap", "--proxy-uid 0",
		"--connect-timeout", "--idle-timeout", "--drain-timeout", "--max-connections", "--admin 0.0.0.0:16000", `--log-format "xml"`, `--listen "everywhere"`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not reported in:\n%s", want, got)
		}
	}
}

func TestAdminAndHealthHavePortsOfTheirOwn(t *testing.T) {
	for _, tt := range []struct{ admin, health, want string }{
		{"127.0.0.1:16001", "[::]:16020", "--admin 127.0.0.1:16001: has the port of a listener"},
		{"127.0.0.1:16000", "10.0.0.1:16007", "--health 10.0.0.1:16007: has the port of a listener"},
		{"127.0.0.1:9000", "[::]:9000", "must differ"},
		{"127.0.0.1:9000", "127.0.0.1:9000", "must differ"},
		{"127.0.0.1:9000", "0.0.0.0:9000", "must differ"},
		{"[::1]:9000", "0.0.0.0:9000", ""},
		{"127.0.0.1:9000", "10.0.0.1:9000", ""},
		{"127.0.0.1:0", "[::]:0", ""},
	} {
		p := DefaultProxy()
		p.Admin, p.Health = netip.MustParseAddrPort(tt.admin), netip.MustParseAddrPort(tt.health)
		err := p.Validate()
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("admin %s, health %s: %v", tt.admin, tt.health, err)
		}
	}
	p := DefaultProxy()
	p.Admin, p.Health = netip.AddrPort{}, netip.AddrPort{}
	if err := p.Validate(); err != nil {
		t.Errorf("none of them: %v", err)
	}
}

func TestFlagValues(t *testing.T) {
	for _, s := range []string{"hold", "open", "closed"} {
		var m FailureMode
		if err := m.Set(s); err != nil || m.String() != s {
			t.Errorf("%s is read as %s (%v)", s, m, err)
		}
	}
	for _, s := range []string{"", "Hold", "drop"} {
		var m FailureMode
		if err := m.Set(s); err == nil {
			t.Errorf("%q is read as %s", s, m)
		}
	}
	for _, s := range []string{"1-65535", "20000-26999", "7"} {
		var r PortRange
		if err := r.Set(s); err != nil || r.String() != s {
			t.Errorf("%s is read as %s (%v)", s, r, err)
		}
	}
	for _, s := range []string{"", "0", "0-5", "5-4", "1-65536", "-1-5", "a-b", "1-2-3"} {
		var r PortRange
		if err := r.Set(s); err == nil {
			t.Errorf("%q is read as %s", s, r)
		}
	}
}

func TestFaultsCarryTheirOutermostHintAndExit(t *testing.T) {
	inner := &Fault{Err: errors.New("cause"), Hint: "do this", Exit: ExitNoPerm}
	outer := &Fault{Err: fmt.Errorf("verb: %w", inner)}
	wrapped := fmt.Errorf("more: %w", outer)
	if HintOf(wrapped) != "do this" || ExitOf(wrapped) != ExitNoPerm {
		t.Errorf("hint %q, exit %d", HintOf(wrapped), ExitOf(wrapped))
	}
	if ExitOf(errors.New("plain")) != ExitFailure || ExitOf(nil) != 0 || HintOf(errors.New("plain")) != "" {
		t.Error("a plain error is not a plain failure")
	}
}
