// SPDX-License-Identifier: Apache-2.0

package compat

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/pillionproxy/pillion/config"
)

// handler answers for one name: it changes the result and fills in the finding, or says that the value is malformed.
type handler func(r *reader, f *Finding) error

// reader collects a result.
type reader struct {
	Result
	errs []error
	held map[string]*Finding // by a key of the system, for its finish
	all  []*Finding
}

func newReader(system string) *reader {
	return &reader{Result: Result{System: system}, held: map[string]*Finding{}}
}

// read answers for every name of the system among the values, in their order.
func (r *reader) read(values map[string]string, names map[string]handler, prefixes []string, s *system) {
	for _, name := range slices.Sorted(maps.Keys(values)) {
		h, known := names[name]
		if !known {
			if !slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(name, p) }) {
				continue
			}
			h = s.unknown(name)
		}
		f := &Finding{Name: name, Value: values[name]}
		if err := h(r, f); err != nil {
			r.malformed(f, err)
			continue
		}
		r.all = append(r.all, f)
	}
}

// unknown answers for a name that is the system's and in no table.
func (s *system) unknown(name string) handler {
	for _, h := range s.harmless {
		if h.pattern.MatchString(name) {
			return ignore(h.why)
		}
	}
	return refuse("not a name that Pillion knows", "say what it means with Pillion's own flags, and unset it")
}

func (r *reader) malformed(f *Finding, err error) {
	r.errs = append(r.errs, &config.Fault{
		Err: fmt.Errorf("%s=%q: %w", f.Name, f.Value, err), Exit: config.ExitConfig,
		Hint: fmt.Sprintf("correct %s, or leave --compat %s out and use Pillion's own flags", f.Name, r.System),
	})
}

func (r *reader) done(s *system) (Result, error) {
	if s.finish != nil {
		s.finish(r)
	}
	for _, f := range r.all {
		r.Findings = append(r.Findings, *f)
	}
	return r.Result, errors.Join(r.errs...)
}

func (f *Finding) mapped(flags ...string) { f.Effect, f.Flags = Mapped, append(f.Flags, flags...) }

func (f *Finding) ignored(why string) { f.Effect, f.Reason = Ignored, why }

func (f *Finding) refused(why, hint string) { f.Effect, f.Reason, f.Hint = Refused, why, hint }

func ignore(why string) handler {
	return func(_ *reader, f *Finding) error { f.ignored(why); return nil }
}

func refuse(why, hint string) handler {
	return func(_ *reader, f *Finding) error { f.refused(why, hint); return nil }
}

// hold leaves a name to the system's finish.
func hold(key string) handler {
	return func(r *reader, f *Finding) error { r.held[key] = f; return nil }
}

// boolean has one answer for true and one for false.
func boolean(yes, no handler) handler {
	return func(r *reader, f *Finding) error {
		on, err := parseBool(f.Value)
		if err != nil {
			return err
		}
		if on {
			return yes(r, f)
		}
		return no(r, f)
	}
}

func parseBool(s string) (bool, error) {
	switch strings.ToLower(strings.TrimSpace(s)) {
	case "", "false", "0", "f", "no", "disabled":
		return false, nil
	case "true", "1", "t", "yes", "enabled":
		return true, nil
	}
	return false, errors.New("must be true or false")
}

// list maps a list of entries to one dimension of the selection. An empty one asks for nothing.
func list[T fmt.Stringer](flag string, parse func(string) ([]T, error), to func(*config.Selection) *[]T) handler {
	return func(r *reader, f *Finding) error {
		entries, err := parseList(f.Value, parse)
		if err != nil {
			return err
		}
		if len(entries) == 0 {
			f.ignored("an empty list: nothing is meant")
			return nil
		}
		r.add(f, flag, func(s *config.Selection) { dst := to(s); *dst = append(*dst, entries...) }, texts(entries))
		return nil
	}
}

// add changes the selection and says by which flag.
func (r *reader) add(f *Finding, flag string, change func(*config.Selection), value string) {
	change(&r.Selection)
	f.mapped("--" + flag + "=" + value)
}

func texts[T fmt.Stringer](entries []T) string {
	s := make([]string, len(entries))
	for i, e := range entries {
		s[i] = e.String()
	}
	return strings.Join(s, ",")
}

// parseList reads a list as these systems write it: spaces and empty entries do not count.
func parseList[T any](s string, parse func(string) ([]T, error)) ([]T, error) {
	var fields []string
	for field := range strings.SplitSeq(s, ",") {
		if field = strings.TrimSpace(field); field != "" {
			fields = append(fields, field)
		}
	}
	if len(fields) == 0 {
		return nil, nil
	}
	return parse(strings.Join(fields, ","))
}

// parseCIDRs takes prefixes with bits behind their length too, as iptables does.
func parseCIDRs(s string) ([]netip.Prefix, error) {
	fields := strings.Split(s, ",")
	for i, field := range fields {
		if p, err := netip.ParsePrefix(field); err == nil && !p.Addr().Is4In6() {
			fields[i] = p.Masked().String()
		}
	}
	return config.ParseCIDRs(strings.Join(fields, ","))
}

// parseInterfaces takes the + of iptables for our *.
func parseInterfaces(s string) ([]config.InterfaceName, error) {
	fields := strings.Split(s, ",")
	for i, field := range fields {
		if begin, ok := strings.CutSuffix(field, "+"); ok {
			fields[i] = begin + "*"
		}
	}
	return config.ParseInterfaces(strings.Join(fields, ","))
}

// parsePort reads a port to listen on.
func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(strings.TrimSpace(s), 10, 16)
	if err != nil || n == 0 {
		return 0, errors.New("must be a port, from 1 to 65535")
	}
	return uint16(n), nil
}

func listener(flag string, to func(*Result) *uint16) handler {
	return func(r *reader, f *Finding) error {
		port, err := parsePort(f.Value)
		if err != nil {
			return err
		}
		*to(&r.Result) = port
		f.mapped(fmt.Sprintf("--%s=%d", flag, port))
		f.Reason = "give the proxy the same flag"
		return nil
	}
}

// proxyUser maps the user of the proxy. Where a system knows several, the first is the proxy's and the others are left
// alone like it.
func proxyUser(r *reader, f *Finding) error {
	ids, err := parseList(f.Value, config.ParseIDs)
	if err != nil {
		return err
	}
	if len(ids) == 0 {
		f.ignored("an empty value: nothing is meant")
		return nil
	}
	if ids[0].First != ids[0].Last || ids[0].First == 0 {
		return errors.New("must be a user id, and not root's")
	}
	r.ProxyUID = ids[0].First
	f.mapped(fmt.Sprintf("--proxy-uid=%d", r.ProxyUID))
	if others := ids[1:]; len(others) > 0 {
		r.add(f, "exclude-uids", func(s *config.Selection) { s.UIDs.Exclude = append(s.UIDs.Exclude, others...) }, texts(others))
	}
	return nil
}

// The dimensions of a selection, for list.
var (
	excludeInboundPorts  = list("exclude-inbound-ports", config.ParsePorts, func(s *config.Selection) *[]config.PortRange { return &s.InboundPorts.Exclude })
	includeInboundPorts  = list("include-inbound-ports", config.ParsePorts, func(s *config.Selection) *[]config.PortRange { return &s.InboundPorts.Include })
	excludeOutboundPorts = list("exclude-outbound-ports", config.ParsePorts, func(s *config.Selection) *[]config.PortRange { return &s.OutboundPorts.Exclude })
	includeOutboundPorts = list("include-outbound-ports", config.ParsePorts, func(s *config.Selection) *[]config.PortRange { return &s.OutboundPorts.Include })
	excludeInboundCIDRs  = list("exclude-inbound-cidrs", parseCIDRs, func(s *config.Selection) *[]netip.Prefix { return &s.InboundCIDRs.Exclude })
	excludeOutboundCIDRs = list("exclude-outbound-cidrs", parseCIDRs, func(s *config.Selection) *[]netip.Prefix { return &s.OutboundCIDRs.Exclude })
	includeOutboundCIDRs = list("include-outbound-cidrs", parseCIDRs, func(s *config.Selection) *[]netip.Prefix { return &s.OutboundCIDRs.Include })
	excludeUIDs          = list("exclude-uids", config.ParseIDs, func(s *config.Selection) *[]config.IDRange { return &s.UIDs.Exclude })
	excludeGIDs          = list("exclude-gids", config.ParseIDs, func(s *config.Selection) *[]config.IDRange { return &s.GIDs.Exclude })
	includeGIDs          = list("include-gids", config.ParseIDs, func(s *config.Selection) *[]config.IDRange { return &s.GIDs.Include })
)

// excludeInterfaces is both directions.
func excludeInterfaces(r *reader, f *Finding) error {
	names, err := parseList(f.Value, parseInterfaces)
	if err != nil {
		return err
	}
	if len(names) == 0 {
		f.ignored("an empty list: nothing is meant")
		return nil
	}
	r.add(f, "exclude-outbound-interfaces", func(s *config.Selection) {
		s.OutboundInterfaces.Exclude = append(s.OutboundInterfaces.Exclude, names...)
	}, texts(names))
	r.add(f, "exclude-inbound-interfaces", func(s *config.Selection) { s.InboundInterfaces.Exclude = append(s.InboundInterfaces.Exclude, names...) }, texts(names))
	return nil
}

// noInbound and noOutbound leave a whole direction alone.
func noInbound(r *reader, f *Finding) error {
	r.add(f, "exclude-inbound-ports", func(s *config.Selection) { s.InboundPorts.Exclude = append(s.InboundPorts.Exclude, everyPort...) }, texts(everyPort))
	return nil
}

func noOutbound(r *reader, f *Finding) error {
	r.add(f, "exclude-outbound-cidrs", func(s *config.Selection) { s.OutboundCIDRs.Exclude = append(s.OutboundCIDRs.Exclude, everything...) }, texts(everything))
	return nil
}

// backend is a wish.
func backend(name string) handler {
	return func(r *reader, f *Finding) error {
		r.Backend = name
		f.mapped("--backend=" + name)
		return nil
	}
}

// Answers that several systems share.
var (
	noDNS       = refuse("DNS is not captured by this version", "unset it; names are resolved as without a sidecar")
	noConntrack = ignore("not needed: no connection is tracked, so that none is ever out of a window")
	asDefault   = ignore("this is how Pillion works")
	wantsNone   = refuse("it asks for no capture at all", "do not run `pillion init` for this pod")
)
