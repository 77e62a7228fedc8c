// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"

	"github.com/pillionproxy/pillion/config"
	"go.yaml.in/yaml/v3"
)

// Told is what the two containers make of their flags.
type Told struct {
	Init  config.Capture
	Proxy config.Proxy
}

// initFlags are what init is told.
func (s Settings) initFlags() map[string]string {
	told := make(map[string]string)
	if s.Variant == UnprivilegedProxy {
		told["backend"] = "redirect"
	}
	return s.flags(told, func(f Setting) bool { return f.Init })
}

// proxyFlags are what proxy is told.
func (s Settings) proxyFlags() map[string]string {
	told := map[string]string{"listen": string(config.ListenLoopback)}
	if s.Variant == UnprivilegedProxy {
		told["listen"] = string(config.ListenAny)
	}
	return s.flags(told, func(f Setting) bool { return f.Proxy })
}

func (s Settings) flags(told map[string]string, its func(Setting) bool) map[string]string {
	for name, v := range s.Values {
		if its(s.Known[name]) {
			told[name] = v
		}
	}
	return told
}

func args(verb string, flags map[string]string) *yaml.Node {
	list := []*yaml.Node{str(verb)}
	for _, name := range slices.Sorted(maps.Keys(flags)) {
		list = append(list, str("--"+name+"="+flags[name]))
	}
	return sequence(list...)
}

// Validate reports everything for which the containers would refuse to start, or the cluster to start them, in whatever pod.
// The errors name flags.
func (s Settings) Validate() error {
	_, errs := s.problems()
	return errors.Join(errs...)
}

// configure is what the containers of a pod make of their flags. A problem is told where the annotation is that has a part
// in it.
func (s Settings) configure(d *document, t template) (Told, error) {
	told, errs := s.problems()
	var f faults
	for _, err := range errs {
		hint := config.HintOf(err)
		if hint == "" {
			hint = "a flag is an annotation of its name, without the dashes: " + AnnotationPrefix
		}
		name, at := s.partIn(err)
		if at == nil {
			f.add(d, t.spec, hint, "%v", err)
			continue
		}
		f.add(d, at, hint, "annotation %s%s: %v", AnnotationPrefix, name, err)
	}
	return told, f.err()
}

// flagName finds the flags in an error.
var flagName = regexp.MustCompile(`--[a-z][a-z-]*[a-z]`)

// partIn finds an annotation that an error is about: the first that it names the flag of.
func (s Settings) partIn(err error) (name string, at *yaml.Node) {
	for _, flag := range flagName.FindAllString(err.Error(), -1) {
		if at := s.by[flag[2:]]; at != nil {
			return flag[2:], at
		}
	}
	return "", nil
}

// problems are what is wrong with the settings together, each once.
func (s Settings) problems() (told Told, errs []error) {
	told = Told{config.DefaultCapture(), config.DefaultProxy()}
	add := func(err error) {
		if err != nil && !slices.ContainsFunc(errs, func(e error) bool { return e.Error() == err.Error() }) {
			errs = append(errs, err)
		}
	}
	if s.Configure != nil {
		var err error
		told, err = s.Configure(s.initFlags(), s.proxyFlags())
		add(err)
	}
	for _, err := range []error{told.Init.Validate(), told.Proxy.Validate()} {
		var list interface{ Unwrap() []error }
		if !errors.As(err, &list) {
			add(err)
			continue
		}
		for _, e := range list.Unwrap() { // what both must agree on, both complain of
			add(e)
		}
	}
	add(s.wrongHealth(told))
	add(s.wrongVariant())
	add(lessThan("cpu", s.CPULimit, s.CPURequest))
	add(lessThan("memory", s.MemoryLimit, s.MemoryRequest))
	return told, errs
}

// wrongHealth refuses probes that the kubelet could not make: it calls the pod's own address, at a port that is written here.
func (s Settings) wrongHealth(told Told) error {
	h := told.Proxy.Health
	hint := fmt.Sprintf("--health [::]:%d is what it is without; with --health none there are no probes", config.PortHealth)
	switch {
	case !h.IsValid():
		return nil
	case h.Port() == 0:
		return &config.Fault{Err: fmt.Errorf("--health %s: any free port, which the kubelet would not know", h), Hint: hint}
	case h.Addr().Unmap().IsLoopback():
		return &config.Fault{Err: fmt.Errorf("--health %s: the kubelet does not reach the loopback of a pod", h), Hint: hint}
	}
	return nil
}

// wrongVariant refuses what the containers of a variant are told, where they could not do it.
func (s Settings) wrongVariant() error {
	backend, listen := s.initFlags()["backend"], config.Listen(s.proxyFlags()["listen"])
	switch {
	case s.Variant == UnprivilegedProxy && backend != "redirect":
		return &config.Fault{
			Err:  fmt.Errorf("--backend %s: the variant %s has the backend redirect", backend, s.Variant),
			Hint: "leave --backend out, or take another --variant",
		}
	case s.Variant == UnprivilegedProxy && listen == config.ListenLoopback:
		return &config.Fault{
			Err:  fmt.Errorf("--listen %s: takes CAP_NET_RAW, which the sidecar of the variant %s does not have", listen, s.Variant),
			Hint: "leave --listen out, or take another --variant",
		}
	case backend == "redirect" && listen == config.ListenLoopback:
		return &config.Fault{
			Err:  fmt.Errorf("--backend redirect: hands connections over at addresses of the pod, and the sidecar of the variant %s listens on loopback", s.Variant),
			Hint: "give --listen any as well, or take --variant " + string(UnprivilegedProxy),
		}
	}
	return nil
}

// lessThan refuses a limit below what is asked for, as the API server does.
func lessThan(resource string, limit, request Quantity) error {
	l, r := limit.value(), request.value()
	if l == nil || r == nil || l.Cmp(r) >= 0 {
		return nil
	}
	return &config.Fault{
		Err:  fmt.Errorf("--%s-limit %s: is less than --%s-request %s", resource, limit, resource, request),
		Hint: fmt.Sprintf("raise the limit, or ask for less by --%s-request", resource),
	}
}
