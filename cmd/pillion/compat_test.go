// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/pillionproxy/pillion/config"
	"github.com/spf13/pflag"
)

func TestCompatIsOverruledByFlagsAndOurVariables(t *testing.T) {
	e := &env{getenv: func(name string) string { return map[string]string{"PILLION_PROXY_UID": "1700"}[name] }}
	policy := config.DefaultCapture()
	policy.ProxyUID = 1700
	f := pflag.NewFlagSet("init", pflag.ContinueOnError)
	captureFlags(f, &policy)
	if err := f.Parse([]string{"--exclude-outbound-ports=1", "--outbound-port=16001"}); err != nil { // the default, but given
		t.Fatal(err)
	}
	var out bytes.Buffer
	backend, err := applyCompat([]string{
		"ENVOY_PORT=15001", "PROXY_UID=1337", "ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE=5432", "ISTIO_LOCAL_EXCLUDE_PORTS=22",
		"ISTIO_INBOUND_INTERCEPTION_MODE=TPROXY", "INVALID_DROP=true",
	}, "istio", &policy, givenFlags(e, f), slog.New(slog.NewTextHandler(&out, nil)))
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(policy.Selection.Flags(), " "); backend != "tproxy" || policy.ProxyUID != 1700 || policy.Listeners.Outbound != 16001 ||
		got != "--exclude-outbound-ports=1 --exclude-inbound-ports=22" {
		t.Errorf("backend %q, proxy uid %d, outbound port %d, selection %q", backend, policy.ProxyUID, policy.Listeners.Outbound, got)
	}
	for _, want := range []string{"INVALID_DROP", "no connection is tracked", "flag=--outbound-port", "flag=--proxy-uid", "flag=--exclude-outbound-ports"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the log does not say %q:\n%s", want, out.String())
		}
	}
}

func TestCompatRefusesAloud(t *testing.T) {
	none := func(string) bool { return false }
	for _, tt := range []struct {
		system, environ string
		exit            int
		says            string
	}{
		{"istio", "ISTIO_META_DNS_CAPTURE=true", config.ExitConfig, "ISTIO_META_DNS_CAPTURE"},
		{"istio", "ISTIO_INBOUND_PORTS=http", config.ExitConfig, "from 0 to 65535"},
		{"kuma", "KUMA_TRANSPARENT_PROXY_X=1", config.ExitConfig, "KUMA_TRANSPARENT_PROXY_X"},
		{"envoy", "", config.ExitUsage, "envoy"},
	} {
		policy := config.DefaultCapture()
		_, err := applyCompat([]string{tt.environ}, tt.system, &policy, none, slog.New(slog.DiscardHandler))
		if err == nil || config.ExitOf(err) != tt.exit || config.HintOf(err) == "" || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s %s: %v (exit %d, hint %q)", tt.system, tt.environ, err, config.ExitOf(err), config.HintOf(err))
		}
		if !policy.Selection.IsZero() {
			t.Errorf("%s %s: the policy was changed", tt.system, tt.environ)
		}
	}
}
