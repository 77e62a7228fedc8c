// SPDX-License-Identifier: Apache-2.0

package compat

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/pillionproxy/pillion/config"
)

// name is a variable or annotation, and what becomes of it. Several values are several cases.
type name struct {
	system, name string
	values       []tried
}

type tried struct {
	in     string
	effect Effect
	says   string // a flag where mapped; part of the reason else
}

func mapped(in string, flags ...string) tried { return tried{in, Mapped, strings.Join(flags, " ")} }
func ignored(in, why string) tried            { return tried{in, Ignored, why} }
func refused(in, why string) tried            { return tried{in, Refused, why} }

// malformed has no finding: the error names it, and says what is allowed.
func malformed(in, says string) tried { return tried{in, "", says} }

const (
	all    = "--exclude-outbound-cidrs=0.0.0.0/0,::/0"
	allIn  = "--exclude-inbound-ports=0-65535"
	conntr = "no connection is tracked"
)

var variables = []name{
	{"istio", "ENVOY_PORT", []tried{mapped("15001", "--outbound-port=15001"), malformed("0", "from 1 to 65535"), malformed("http", "from 1 to 65535")}},
	{"istio", "INBOUND_CAPTURE_PORT", []tried{mapped("15006", "--inbound-port=15006"), malformed("70000", "from 1 to 65535")}},
	{"istio", "INBOUND_TUNNEL_PORT", []tried{ignored("15008", "Istio's proxy")}},
	{"istio", "PROXY_UID", []tried{mapped("1337", "--proxy-uid=1337"), mapped("1337,0", "--proxy-uid=1337 --exclude-uids=0"), malformed("0", "not root's"), malformed("istio-proxy", "id -u NAME")}},
	{"istio", "PROXY_GID", []tried{mapped("1337", "--exclude-gids=1337")}},
	{"istio", "ENVOY_USER", []tried{refused("istio-proxy", "by its number")}},
	{"istio", "ISTIO_INBOUND_INTERCEPTION_MODE", []tried{mapped("REDIRECT", "--backend=redirect"), mapped("TPROXY", "--backend=tproxy"), refused("NONE", "no capture"), malformed("tproxy", "REDIRECT, TPROXY or NONE")}},
	{"istio", "ISTIO_INBOUND_TPROXY_MARK", []tried{ignored("1337", "--slot")}},
	{"istio", "ISTIO_INBOUND_TPROXY_ROUTE_TABLE", []tried{ignored("133", "--slot")}},
	{"istio", "ISTIO_INBOUND_PORTS", []tried{mapped("", allIn), mapped("80, 443,", "--include-inbound-ports=80,443"), ignored("*", "everything"), malformed("80,x", "neither a port")}},
	{"istio", "ISTIO_LOCAL_EXCLUDE_PORTS", []tried{mapped("22,15020", "--exclude-inbound-ports=22,15020"), ignored("", "empty"), malformed("22:23", "neither a port")}},
	{"istio", "ISTIO_OUTBOUND_PORTS", []tried{ignored("3306", "captured anyway")}},
	{"istio", "ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE", []tried{mapped("53", "--exclude-outbound-ports=53")}},
	{"istio", "ISTIO_SERVICE_CIDR", []tried{
		mapped("", all), ignored("*", "everything"), mapped("10.96.0.0/12,fd00::/8", "--include-outbound-cidrs=10.96.0.0/12,fd00::/8"),
		mapped("10.1.2.3/8", "--include-outbound-cidrs=10.0.0.0/8"), refused("127.0.0.0/8,10.0.0.0/8", "loopback"), malformed("10.0.0.0/99", "neither an address"),
	}},
	{"istio", "ISTIO_SERVICE_EXCLUDE_CIDR", []tried{mapped("169.254.169.254/32", "--exclude-outbound-cidrs=169.254.169.254/32"), malformed("*", "neither an address")}},
	{"istio", "ISTIO_EXCLUDE_INTERFACES", []tried{mapped("net1,veth+", "--exclude-outbound-interfaces=net1,veth* --exclude-inbound-interfaces=net1,veth*"), ignored("", "empty"), malformed("a/b", "no interface name")}},
	{"istio", "KUBE_VIRT_INTERFACES", []tried{refused("vnet0", "virtual machines"), ignored("", "empty")}},
	{"istio", "ISTIO_OUTBOUND_OWNER_GROUPS", []tried{ignored("*", "everything"), mapped("101,202", "--include-gids=101,202"), mapped("", "--exclude-gids=0-4294967294"), malformed("java", "numeric id")}},
	{"istio", "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", []tried{mapped("888", "--exclude-gids=888")}},
	{"istio", "ISTIO_META_DNS_CAPTURE", []tried{refused("true", "DNS"), ignored("false", "how Pillion works"), malformed("maybe", "true or false")}},
	{"istio", "REDIRECT_DNS", []tried{refused("1", "DNS")}},
	{"istio", "CAPTURE_ALL_DNS", []tried{refused("true", "DNS")}},
	{"istio", "INVALID_DROP", []tried{ignored("true", conntr), ignored("", "how Pillion works")}},
	{"istio", "DROP_INVALID", []tried{ignored("true", conntr)}},
	{"istio", "ISTIO_DUAL_STACK", []tried{ignored("true", "how Pillion works"), ignored("false", "::/0")}},
	{"istio", "ISTIO_AGENT_DUAL_STACK", []tried{ignored("true", "how Pillion works")}},
	{"istio", "ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", []tried{ignored("127.0.0.1/32", "never captured"), refused("10.0.0.0/8", "no loopback"), malformed("x", "prefix")}},
	{"istio", "ISTIO_META_CLUSTER_ID", []tried{ignored("Kubernetes", "Istio's proxy")}},
	{"istio", "ISTIO_SOMETHING_NEW", []tried{refused("1", "not a name that Pillion knows")}},

	{"kuma", "KUMA_TRANSPARENT_PROXY_KUMA_DP_USER", []tried{mapped("5678", "--proxy-uid=5678"), malformed("kuma-dp", "id -u NAME")}},
	{"kuma", "KUMA_TRANSPARENT_PROXY_IP_FAMILY_MODE", []tried{ignored("dualstack", "both families"), mapped("ipv4", "--exclude-outbound-cidrs=::/0 --exclude-inbound-cidrs=::/0"), malformed("ipv6", "dualstack or ipv4")}},
	{"kuma", "KUMA_TRANSPARENT_PROXY_REDIRECT_INBOUND_ENABLED", []tried{ignored("true", "how Pillion works"), mapped("false", allIn)}},
	{"kuma", "KUMA_TRANSPARENT_PROXY_REDIRECT_INBOUND_PORT", []tried{mapped("15006", "--inbound-port=15006")}},
	{"kuma", "KUMA_TRANSPARENT_PROXY_REDIRECT_INBOUND_INCLUDE_PORTS", []tried{mapped("80", "--include-inbound-ports=80")}},
	{"kuma", "KUMA_TRANSPARENT_PROXY_REDIRECT_INBOUND_EXCLUDE_PORTS", []tried{mapped("22", "--exclude-inbound-ports=22")}},
	{"kuma", "KUMA_TRANSPARENT_PROXY_REDIRECT_INBOUND_EXCLUDE_PORTS_FOR_IPS", []tried{mapped("10.0.0.0/8", "--exclude-inbound-cidrs=10.0.0.0/8")}},
	{"kuma", "KUMA_TRANSPARENT_PROXY_REDIRECT_INBOUND_EXCLUDE_PORTS_FOR_UIDS", []tried{refused("tcp:80:1", "no user")}},
	{"kuma", "KUMA_TRANSPARENT_PROXY_REDIRECT_OUTBOUND_ENABLED", []tried{mapped("false", all)}},
	{"kuma", "KUMA_TRANSPARENT_PROXY_REDIRECT_OUTBOUND_PORT", []tried{mapped("15001", "--outbound-port=15001")}},
	{"kuma", "KUMA_TRANSPARENT_PROXY_REDIRECT_OUTBOUND_INCLUDE_PORTS", []tried{mapped("443", "--include-outbound-ports=443")}},
	{"kuma", "KUMA_TRANSPARENT_PROXY_REDIRECT_OUTBOUND_EXCLUDE_PORTS", []tried{mapped("5678,8900", "--exclude-outbound-ports=5678,8900")}},
	{"kuma", "KUMA_TRANSPARENT_PROXY_REDIRECT_OUTBOUND_EXCLUDE_PORTS_FOR_IPS", []tried{mapped("fd10::/16", "--exclude-outbound-cidrs=fd10::/16")}},
	{"kuma", "KUMA_TRANSPARENT_PROXY_REDIRECT_OUTBOUND_EXCLUDE_PORTS_FOR_UIDS", []tried{mapped("1000", "--exclude-uids=1000")}},
	{"kuma", "KUMA_TRANSPARENT_PROXY_REDIRECT_DNS_ENABLED", []tried{refused("true", "DNS"), ignored("false", "how Pillion works")}},
	{"kuma", "KUMA_TRANSPARENT_PROXY_REDIRECT_DNS_CAPTURE_ALL", []tried{ignored("true", "REDIRECT_DNS_ENABLED")}},
	{"kuma", "KUMA_TRANSPARENT_PROXY_REDIRECT_DNS_PORT", []tried{ignored("15053", "REDIRECT_DNS_ENABLED")}},
	{"kuma", "KUMA_TRANSPARENT_PROXY_REDIRECT_VNET_NETWORKS", []tried{refused("br+:172.17.0.0/16", "virtual networks"), ignored("", "empty")}},
	{"kuma", "KUMA_TRANSPARENT_PROXY_EBPF_ENABLED", []tried{mapped("true", "--backend=ebpf"), ignored("false", "by itself")}},
	{"kuma", "KUMA_TRANSPARENT_PROXY_EBPF_CGROUP_PATH", []tried{ignored("/sys/fs/cgroup", "by themselves")}},
	{"kuma", "KUMA_TRANSPARENT_PROXY_DROP_INVALID_PACKETS", []tried{ignored("true", conntr)}},
	{"kuma", "KUMA_TRANSPARENT_PROXY_WAIT", []tried{ignored("5", "iptables rules")}},
	{"kuma", "KUMA_TRANSPARENT_PROXY_DRY_RUN", []tried{refused("true", "installed all the same"), ignored("false", "how Pillion works")}},
	{"kuma", "KUMA_TRANSPARENT_PROXY_SOMETHING", []tried{refused("1", "not a name that Pillion knows")}},

	// Annotations, as the downward API may set them.
	{"istio", "TRAFFIC_SIDECAR_ISTIO_IO_EXCLUDEOUTBOUNDPORTS", []tried{mapped("5432", "--exclude-outbound-ports=5432")}},
	{"linkerd", "CONFIG_LINKERD_IO_SKIP_OUTBOUND_PORTS", []tried{mapped("4567-4568", "--exclude-outbound-ports=4567-4568")}},
	{"consul", "CONSUL_HASHICORP_COM_TRANSPARENT_PROXY_EXCLUDE_UIDS", []tried{mapped("1000", "--exclude-uids=1000")}},
	{"kuma", "TRAFFIC_KUMA_IO_EXCLUDE_INBOUND_PORTS", []tried{mapped("1234", "--exclude-inbound-ports=1234")}},
}

var annotations = []name{
	{"istio", "sidecar.istio.io/interceptionMode", []tried{mapped("TPROXY", "--backend=tproxy"), refused("NONE", "no capture"), malformed("nat", "REDIRECT, TPROXY or NONE")}},
	{"istio", "traffic.sidecar.istio.io/includeInboundPorts", []tried{mapped("", allIn), ignored("*", "everything"), mapped("8080", "--include-inbound-ports=8080")}},
	{"istio", "traffic.sidecar.istio.io/excludeInboundPorts", []tried{mapped("22", "--exclude-inbound-ports=22")}},
	{"istio", "traffic.sidecar.istio.io/includeOutboundPorts", []tried{ignored("9000", "captured anyway")}},
	{"istio", "traffic.sidecar.istio.io/excludeOutboundPorts", []tried{mapped("5432,9042", "--exclude-outbound-ports=5432,9042")}},
	{"istio", "traffic.sidecar.istio.io/includeOutboundIPRanges", []tried{mapped("", all), ignored("*", "everything"), mapped("10.0.0.0/8", "--include-outbound-cidrs=10.0.0.0/8")}},
	{"istio", "traffic.sidecar.istio.io/excludeOutboundIPRanges", []tried{mapped("10.96.0.1/32", "--exclude-outbound-cidrs=10.96.0.1/32"), malformed("10.96.0.0/33", "neither an address")}},
	{"istio", "traffic.sidecar.istio.io/excludeInterfaces", []tried{mapped("net1", "--exclude-outbound-interfaces=net1 --exclude-inbound-interfaces=net1")}},
	{"istio", "traffic.sidecar.istio.io/kubevirtInterfaces", []tried{refused("tap0", "virtual machines")}},
	{"istio", "istio.io/reroute-virtual-interfaces", []tried{refused("tap0", "virtual machines")}},
	{"istio", "status.sidecar.istio.io/port", []tried{ignored("15020", "Istio's proxy")}},
	{"istio", "sidecar.istio.io/proxyCPU", []tried{ignored("100m", "Istio's proxy")}},
	{"istio", "sidecar.istio.io/inject", []tried{ignored("true", "Istio's proxy")}},
	{"istio", "traffic.sidecar.istio.io/new", []tried{refused("1", "not a name that Pillion knows")}},
	{"istio", "sidecar.istio.io/new", []tried{refused("1", "not a name that Pillion knows")}},

	{"linkerd", "config.linkerd.io/skip-inbound-ports", []tried{mapped("25, 4567-4568", "--exclude-inbound-ports=25,4567-4568"), malformed("25-20", "8000-8999")}},
	{"linkerd", "config.linkerd.io/skip-outbound-ports", []tried{mapped("3306", "--exclude-outbound-ports=3306")}},
	{"linkerd", "config.linkerd.io/skip-subnets", []tried{mapped("172.17.0.0/16", "--exclude-inbound-cidrs=172.17.0.0/16")}},
	{"linkerd", "config.linkerd.io/proxy-uid", []tried{mapped("2102", "--proxy-uid=2102"), malformed("root", "id -u NAME")}},
	{"linkerd", "config.linkerd.io/proxy-gid", []tried{mapped("2102", "--exclude-gids=2102")}},
	{"linkerd", "config.linkerd.io/inbound-port", []tried{mapped("4143", "--inbound-port=4143")}},
	{"linkerd", "config.linkerd.io/outbound-port", []tried{mapped("4140", "--outbound-port=4140")}},
	{"linkerd", "config.linkerd.io/opaque-ports", []tried{ignored("3306", "as they come")}},
	{"linkerd", "config.linkerd.io/control-port", []tried{ignored("4190", "Linkerd's proxy")}},
	{"linkerd", "config.linkerd.io/admin-port", []tried{ignored("4191", "Linkerd's proxy")}},
	{"linkerd", "config.linkerd.io/proxy-cpu-limit", []tried{ignored("1", "Linkerd's proxy")}},
	{"linkerd", "config.linkerd.io/new", []tried{refused("1", "not a name that Pillion knows")}},

	{"kuma", "traffic.kuma.io/exclude-inbound-ports", []tried{mapped("1234", "--exclude-inbound-ports=1234")}},
	{"kuma", "traffic.kuma.io/exclude-outbound-ports", []tried{mapped("5678,8900", "--exclude-outbound-ports=5678,8900")}},
	{"kuma", "traffic.kuma.io/exclude-outbound-ports-for-uids", []tried{
		mapped("1000;tcp:*:106-108", "--exclude-uids=1000,106-108"), refused("tcp:443:1234", "tcp:443:1234"), refused("443:1234", "for one user only"),
		ignored("udp:53:1234", "UDP"), ignored("", "empty"), malformed("tcp:443:x", "numeric id"), malformed("a:b:c:d", "PROTOCOL:PORTS:UIDS"), malformed("sctp:1:2", "tcp or udp"),
	}},
	{"kuma", "traffic.kuma.io/exclude-inbound-ips", []tried{mapped("10.0.0.0/8", "--exclude-inbound-cidrs=10.0.0.0/8")}},
	{"kuma", "traffic.kuma.io/exclude-outbound-ips", []tried{mapped("192.168.10.1,fd10::/16", "--exclude-outbound-cidrs=192.168.10.1/32,fd10::/16")}},
	{"kuma", "traffic.kuma.io/drop-invalid-packets", []tried{ignored("true", conntr)}},
	{"kuma", "traffic.kuma.io/iptables-logs", []tried{ignored("true", "pillion status")}},
	{"kuma", "traffic.kuma.io/transparent-proxy-config", []tried{refused("{}", "a whole configuration")}},
	{"kuma", "traffic.kuma.io/transparent-proxy-configmap-name", []tried{refused("x", "ConfigMap")}},
	{"kuma", "kuma.io/transparent-proxying", []tried{ignored("enabled", "how Pillion works"), refused("disabled", "no capture")}},
	{"kuma", "kuma.io/transparent-proxying-inbound-port", []tried{mapped("15006", "--inbound-port=15006")}},
	{"kuma", "kuma.io/transparent-proxying-outbound-port", []tried{mapped("15001", "--outbound-port=15001")}},
	{"kuma", "kuma.io/transparent-proxying-ip-family-mode", []tried{ignored("dualstack", "both families")}},
	{"kuma", "kuma.io/transparent-proxying-ebpf", []tried{mapped("enabled", "--backend=ebpf")}},
	{"kuma", "kuma.io/transparent-proxying-ebpf-bpf-fs-path", []tried{ignored("/x", "by themselves")}},
	{"kuma", "kuma.io/transparent-proxying-new", []tried{refused("1", "not a name that Pillion knows")}},
	{"kuma", "kuma.io/sidecar-uid", []tried{mapped("5678", "--proxy-uid=5678")}},
	{"kuma", "kuma.io/builtin-dns", []tried{refused("enabled", "DNS")}},

	{"consul", "consul.hashicorp.com/transparent-proxy", []tried{ignored("true", "how Pillion works"), refused("false", "no capture")}},
	{"consul", "consul.hashicorp.com/transparent-proxy-status", []tried{ignored("enabled", "injector")}},
	{"consul", "consul.hashicorp.com/transparent-proxy-exclude-inbound-ports", []tried{mapped("8200,8201", "--exclude-inbound-ports=8200,8201")}},
	{"consul", "consul.hashicorp.com/transparent-proxy-exclude-outbound-ports", []tried{mapped("8200", "--exclude-outbound-ports=8200")}},
	{"consul", "consul.hashicorp.com/transparent-proxy-exclude-outbound-cidrs", []tried{mapped("10.0.0.0/24", "--exclude-outbound-cidrs=10.0.0.0/24"), mapped("10.0.0.1", "--exclude-outbound-cidrs=10.0.0.1/32")}},
	{"consul", "consul.hashicorp.com/transparent-proxy-exclude-uids", []tried{mapped("1000,1001", "--exclude-uids=1000,1001"), malformed("bob", "numeric id")}},
	{"consul", "consul.hashicorp.com/transparent-proxy-overwrite-probes", []tried{ignored("true", "probes")}},
	{"consul", "consul.hashicorp.com/redirect-traffic-config", []tried{refused("{}", "injector")}},
	{"consul", "consul.hashicorp.com/consul-dns", []tried{refused("true", "DNS")}},
	{"consul", "consul.hashicorp.com/connect-inject", []tried{ignored("true", "not about the capture")}},
	{"consul", "consul.hashicorp.com/transparent-proxy-new", []tried{refused("1", "not a name that Pillion knows")}},
}

func TestEveryName(t *testing.T) {
	check := func(n name, v tried, r Result, err error) {
		t.Helper()
		if v.effect == "" {
			if err == nil || !strings.Contains(err.Error(), n.name) || !strings.Contains(err.Error(), v.says) {
				t.Errorf("%s=%q: error %v, want one that names it and says %q", n.name, v.in, err, v.says)
			}
			if config.ExitOf(err) != config.ExitConfig || config.HintOf(err) == "" {
				t.Errorf("%s=%q: exit %d, hint %q", n.name, v.in, config.ExitOf(err), config.HintOf(err))
			}
			return
		}
		if err != nil || len(r.Findings) != 1 {
			t.Errorf("%s=%q: findings %+v, error %v", n.name, v.in, r.Findings, err)
			return
		}
		f := r.Findings[0]
		says := f.Reason
		if f.Effect == Mapped {
			says = strings.Join(f.Flags, " ")
		}
		if f.Name != n.name || f.Value != v.in || f.Effect != v.effect || f.Effect == Mapped && says != v.says || !strings.Contains(says, v.says) {
			t.Errorf("%s=%q: %+v, want %s: %s", n.name, v.in, f, v.effect, v.says)
		}
		if f.Effect == Refused && (f.Hint == "" || r.Refused() == nil) {
			t.Errorf("%s=%q is refused without a hint", n.name, v.in)
		}
	}
	for _, n := range variables {
		for _, v := range n.values {
			r, err := FromEnvironment(n.system, []string{n.name + "=" + v.in})
			check(n, v, r, err)
		}
	}
	for _, n := range annotations {
		for _, v := range n.values {
			r, err := FromAnnotations(n.system, map[string]string{n.name: v.in})
			check(n, v, r, err)
		}
	}
}

// TestNoNameIsWithoutATest compares the tables of the systems with those above.
func TestNoNameIsWithoutATest(t *testing.T) {
	tested := func(list []name, system, n string) bool {
		return slices.ContainsFunc(list, func(have name) bool { return have.system == system && have.name == n })
	}
	for _, name := range Systems() {
		s, err := find(name)
		if err != nil {
			t.Fatal(err)
		}
		for n := range s.variables {
			if !tested(variables, name, n) {
				t.Errorf("%s: variable %s has no test", name, n)
			}
		}
		for n := range s.annotations {
			if !tested(annotations, name, n) {
				t.Errorf("%s: annotation %s has no test", name, n)
			}
		}
	}
}

// What is mapped is what Pillion's own flags would have said.
func TestMappedFlagsSayWhatTheSelectionHas(t *testing.T) {
	for _, n := range annotations {
		for _, v := range n.values {
			if v.effect != Mapped {
				continue
			}
			r, err := FromAnnotations(n.system, map[string]string{n.name: v.in})
			if err != nil {
				t.Errorf("%s: %v", n.name, err)
			}
			want := slices.DeleteFunc(slices.Clone(r.Findings[0].Flags), func(f string) bool {
				return strings.HasPrefix(f, "--proxy-uid") || strings.HasPrefix(f, "--backend") || strings.HasSuffix(strings.Split(f, "=")[0], "-port")
			})
			got := r.Selection.Flags()
			slices.Sort(got)
			slices.Sort(want)
			if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("%s=%q (-finding +selection):\n%s", n.name, v.in, diff)
			}
		}
	}
}

// Istio judges some names together.
func TestIstioJudgesTogether(t *testing.T) {
	const p = "traffic.sidecar.istio.io/"
	for _, tt := range []struct {
		annotations map[string]string
		flags       []string
		refused     string
	}{
		{map[string]string{p + "includeInboundPorts": "*", p + "excludeInboundPorts": "22"}, []string{"--exclude-inbound-ports=22"}, ""},
		{map[string]string{p + "includeInboundPorts": "80,22", p + "excludeInboundPorts": "22"}, []string{"--include-inbound-ports=80,22"}, ""},
		{map[string]string{p + "includeInboundPorts": "", p + "excludeInboundPorts": "22"}, []string{allIn}, ""},
		{map[string]string{p + "includeOutboundIPRanges": "", p + "includeOutboundPorts": "443"}, []string{"--include-outbound-ports=443"}, ""},
		{map[string]string{p + "includeOutboundIPRanges": "10.0.0.0/8", p + "includeOutboundPorts": "443"}, []string{"--include-outbound-cidrs=10.0.0.0/8"}, "includeOutboundPorts"},
		{map[string]string{p + "includeOutboundIPRanges": "*", p + "includeOutboundPorts": "443", p + "excludeOutboundIPRanges": "10.1.0.0/16"}, []string{"--exclude-outbound-cidrs=10.1.0.0/16"}, ""},
		{map[string]string{p + "includeOutboundIPRanges": "10.0.0.0/8", p + "includeOutboundPorts": ""}, []string{"--include-outbound-cidrs=10.0.0.0/8"}, ""},
		{map[string]string{p + "includeOutboundIPRanges": "", p + "includeOutboundPorts": "*"}, nil, ""},
	} {
		r, err := FromAnnotations("istio", tt.annotations)
		if err != nil || len(r.Findings) != len(tt.annotations) {
			t.Errorf("%v: %d findings, %v", tt.annotations, len(r.Findings), err)
		}
		if diff := cmp.Diff(tt.flags, r.Selection.Flags(), cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("%v (-want +got):\n%s", tt.annotations, diff)
		}
		err = r.Refused()
		if tt.refused == "" && err != nil || tt.refused != "" && (err == nil || !strings.Contains(err.Error(), tt.refused)) {
			t.Errorf("%v: refused %v, want %q", tt.annotations, err, tt.refused)
		}
	}
}

func TestWhatIsNotTheSystemsIsPassedOver(t *testing.T) {
	r, err := FromEnvironment("istio", []string{
		"PATH=/bin", "HOSTNAME=x", "ISTIO_INGRESSGATEWAY_SERVICE_HOST=10.0.0.1", "ISTIO_INGRESSGATEWAY_SERVICE_PORT_HTTP2=80",
		"ISTIO_INGRESSGATEWAY_PORT=tcp://10.0.0.1:80", "ISTIO_INGRESSGATEWAY_PORT_80_TCP_ADDR=10.0.0.1", "KUMA_TRANSPARENT_PROXY_X=1", "nonsense",
	})
	if err != nil || len(r.Findings) != 0 {
		t.Errorf("%+v, %v", r.Findings, err)
	}
	if r, err = FromAnnotations("consul", map[string]string{"prometheus.io/scrape": "true", "config.linkerd.io/new": "1"}); err != nil || len(r.Findings) != 0 {
		t.Errorf("%+v, %v", r.Findings, err)
	}
	// One that looks like a service's, but is not.
	if r, err = FromEnvironment("istio", []string{"ISTIO_STATUS_PORT=15020"}); err != nil || r.Refused() == nil {
		t.Errorf("%+v, %v", r.Findings, err)
	}
	if _, err := FromEnvironment("cilium", nil); err == nil || config.ExitOf(err) != config.ExitUsage {
		t.Errorf("cilium: %v", err)
	}
}

func TestEveryMalformedValueIsReported(t *testing.T) {
	_, err := FromEnvironment("istio", []string{"ENVOY_PORT=x", "ISTIO_INBOUND_PORTS=y", "PROXY_UID=1337"})
	if err == nil || !strings.Contains(err.Error(), "ENVOY_PORT") || !strings.Contains(err.Error(), "ISTIO_INBOUND_PORTS") || strings.Contains(err.Error(), "PROXY_UID") {
		t.Error(err)
	}
}

func TestFlagsWin(t *testing.T) {
	policy := config.DefaultCapture()
	policy.Selection.OutboundPorts.Exclude = []config.PortRange{{First: 1, Last: 1}}
	policy.Listeners.Inbound = 7006
	r, err := FromEnvironment("istio", []string{
		"ENVOY_PORT=15001", "INBOUND_CAPTURE_PORT=15006", "PROXY_UID=1337", "ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE=5432", "ISTIO_SERVICE_EXCLUDE_CIDR=10.0.0.0/8",
	})
	if err != nil {
		t.Fatal(err)
	}
	given := []string{"exclude-outbound-ports", "inbound-port"}
	kept := r.Apply(&policy, func(flag string) bool { return slices.Contains(given, flag) })
	if diff := cmp.Diff(given, kept); diff != "" {
		t.Errorf("flags kept (-want +got):\n%s", diff)
	}
	want := config.DefaultCapture()
	want.ProxyUID, want.Listeners.Outbound, want.Listeners.Inbound = 1337, 15001, 7006
	want.Selection.OutboundPorts.Exclude = []config.PortRange{{First: 1, Last: 1}}
	want.Selection.OutboundCIDRs.Exclude = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	if diff := cmp.Diff(want, policy, cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
		t.Errorf("policy (-want +got):\n%s", diff)
	}
}

// Whatever the values are, nothing panics, each name is answered for once (or in the error), and a policy that comes of it
// is one that init would take.
func FuzzValues(f *testing.F) {
	for _, n := range slices.Concat(variables, annotations) {
		for _, v := range n.values {
			f.Add(v.in, v.in)
		}
	}
	f.Add("*", "10.0.0.0/8,::1/128,0.0.0.0/0")
	f.Fuzz(func(t *testing.T, a, b string) {
		for _, system := range Systems() {
			s, err := find(system)
			if err != nil {
				t.Fatal(err)
			}
			values := map[string]string{}
			for n := range s.annotations {
				values[n] = a
				if len(n)%2 == 0 {
					values[n] = b
				}
			}
			r, err := FromAnnotations(system, values)
			if err == nil && len(r.Findings) != len(values) {
				t.Errorf("%s: %d findings for %d names", system, len(r.Findings), len(values))
			}
			for _, finding := range r.Findings {
				if finding.Effect == "" || finding.Effect == Mapped && len(finding.Flags) == 0 {
					t.Errorf("%s: no answer: %+v", system, finding)
				}
			}
			for _, p := range slices.Concat(r.Selection.OutboundCIDRs.Include, r.Selection.OutboundCIDRs.Exclude, r.Selection.InboundCIDRs.Exclude) {
				if p != p.Masked() || p.Addr().Is4In6() {
					t.Errorf("%s: %v", system, p)
				}
			}
			var environ []string
			for n := range s.variables {
				environ = append(environ, n+"="+a)
			}
			_, _ = FromEnvironment(system, environ)
		}
	})
}
