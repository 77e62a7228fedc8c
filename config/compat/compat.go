// SPDX-License-Identifier: Apache-2.0

// Package compat reads what users of Istio, Linkerd, Kuma and Consul have written to say which traffic is captured, as
// environment variables of their init containers or as annotations of a pod, and says it in Pillion's words.
//
// What always holds: every name that belongs to the system is answered for, by a Finding: mapped to flags, ignored because
// nothing is lost by it, or refused, and a name that is not known is refused. A name that is not set asks for nothing: the
// rest is as Pillion has it by default, which captures everything. Nothing here reads the outside world.
package compat

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/pillionproxy/pillion/config"
)

// Effect is what became of a name.
type Effect string

// The effects.
const (
	Mapped  Effect = "mapped"
	Ignored Effect = "ignored"
	Refused Effect = "refused"
)

// Finding is the answer for one variable or annotation.
type Finding struct {
	Name   string   `json:"name"`
	Value  string   `json:"value"`
	Effect Effect   `json:"effect"`
	Flags  []string `json:"flags,omitempty"` // that say the same
	Reason string   `json:"reason,omitempty"`
	Hint   string   `json:"hint,omitempty"` // what to do about a refusal
}

// Result is what was asked for. Zero values ask for nothing.
type Result struct {
	System    string
	Selection config.Selection
	ProxyUID  uint32
	Outbound  uint16 // port of the outbound listener
	Inbound   uint16 // port of the inbound listener
	Backend   string // a wish, of which `--backend` knows more: ebpf, tproxy, redirect
	Findings  []Finding
}

// Systems are the names that the functions below take.
func Systems() []string { return []string{"istio", "linkerd", "kuma", "consul"} }

// FromEnvironment reads variables, each NAME=VALUE. Beside those of the system's own init container it knows annotations
// under their name in capitals, with _ for what a variable may not have (TRAFFIC_SIDECAR_ISTIO_IO_INCLUDEINBOUNDPORTS), as
// the downward API can set them. The error joins one *config.Fault for each value that is malformed.
func FromEnvironment(system string, environ []string) (Result, error) {
	s, err := find(system)
	if err != nil {
		return Result{}, err
	}
	r := newReader(system)
	names := map[string]handler{}
	for name, h := range s.annotations {
		names[variable(name)] = h
	}
	for name, h := range s.variables {
		names[name] = h
	}
	prefixes := slices.Clone(s.variablePrefixes)
	for _, p := range s.annotationPrefixes {
		prefixes = append(prefixes, variable(p))
	}
	values := map[string]string{}
	for _, e := range environ {
		if name, value, ok := strings.Cut(e, "="); ok && (names[name] != nil || !ofService(name, value)) {
			values[name] = value
		}
	}
	r.read(values, names, prefixes, s)
	return r.done(s)
}

// FromAnnotations reads the annotations of a pod. Those of other systems are passed over. The error is as FromEnvironment's.
func FromAnnotations(system string, annotations map[string]string) (Result, error) {
	s, err := find(system)
	if err != nil {
		return Result{}, err
	}
	r := newReader(system)
	r.read(annotations, s.annotations, s.annotationPrefixes, s)
	return r.done(s)
}

// Refused is the error that lists what was refused, or nil.
func (r Result) Refused() error {
	var lines []string
	hint := ""
	for _, f := range r.Findings {
		if f.Effect != Refused {
			continue
		}
		lines = append(lines, fmt.Sprintf("%s=%q: %s", f.Name, f.Value, f.Reason))
		if hint == "" {
			hint = f.Name + ": " + f.Hint
		}
	}
	if len(lines) == 0 {
		return nil
	}
	return &config.Fault{Err: fmt.Errorf("--compat %s: %s", r.System, strings.Join(lines, "; ")), Hint: hint, Exit: config.ExitConfig}
}

// system is what one of them calls things.
type system struct {
	variables          map[string]handler
	annotations        map[string]handler
	variablePrefixes   []string // a name that begins so is the system's
	annotationPrefixes []string
	harmless           []harmless
	finish             func(*reader) // judges what depends on several names
}

// harmless are names of a system that are not about the capture.
type harmless struct {
	pattern *regexp.Regexp
	why     string
}

func find(name string) (*system, error) {
	switch name {
	case "istio":
		return istio(), nil
	case "linkerd":
		return linkerd(), nil
	case "kuma":
		return kuma(), nil
	case "consul":
		return consul(), nil
	}
	return nil, &config.Fault{
		Err:  fmt.Errorf("--compat %q: not a system whose names are known", name),
		Hint: "there are " + strings.Join(Systems(), ", "), Exit: config.ExitUsage,
	}
}

// serviceVariables are those that a pod has for each service of its namespace: one named istio-x makes ISTIO_X_SERVICE_HOST
// (kubernetes.io/docs/concepts/services-networking/service, environment variables).
var serviceVariables = regexp.MustCompile(`_SERVICE_HOST$|_SERVICE_PORT(_[A-Z0-9_]+)?$|_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?$`)

// ofService reports whether Kubernetes made a variable for a service. NAME_PORT is known by its value: tcp://10.0.0.1:80.
func ofService(name, value string) bool {
	return serviceVariables.MatchString(name) || strings.HasSuffix(name, "_PORT") && strings.Contains(value, "://")
}

// variable is an annotation's name as an environment variable.
func variable(annotation string) string {
	return strings.Map(func(c rune) rune {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' {
			return c
		}
		return '_'
	}, strings.ToUpper(annotation))
}

// everything is all addresses: a selection excludes them where a system says "none".
var everything = []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)}

var everyPort = []config.PortRange{{First: 0, Last: 65535}}
