// SPDX-License-Identifier: Apache-2.0

package inject

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode"

	"go.yaml.in/yaml/v3"
)

// Variant says with what rights the pod's containers of ours run. It is a flag value.
type Variant string

// The variants.
const (
	Privileged        Variant = "privileged"         // the init step as most meshes have it
	Least             Variant = "least"              // the init step with the capabilities that it needs, one by one
	UnprivilegedProxy Variant = "unprivileged-proxy" // the backend redirect: a sidecar without any capability
)

var variants = []Variant{Privileged, Least, UnprivilegedProxy}

// Form says what kind of container the sidecar is. It is a flag value.
type Form string

// The forms.
const (
	Native   Form = "native"   // an init container that keeps running (Kubernetes 1.29): Jobs complete, and it ends last
	Ordinary Form = "ordinary" // a container beside the app's
)

var forms = []Form{Native, Ordinary}

// set parses the name of one of a few.
func set[T ~string](to *T, all []T, s string) error {
	if !slices.Contains(all, T(s)) {
		names := make([]string, len(all))
		for i, a := range all {
			names[i] = string(a)
		}
		return fmt.Errorf("%q is none of %s", s, strings.Join(names, ", "))
	}
	*to = T(s)
	return nil
}

func (v *Variant) String() string     { return string(*v) }
func (v *Variant) Set(s string) error { return set(v, variants, s) }

// Type names the value in help texts.
func (v *Variant) Type() string { return "privileged|least|unprivileged-proxy" }

func (f *Form) String() string     { return string(*f) }
func (f *Form) Set(s string) error { return set(f, forms, s) }

// Type names the value in help texts.
func (f *Form) Type() string { return "native|ordinary" }

func setBool(to *bool, s string) error {
	if s != "true" && s != "false" {
		return fmt.Errorf("%q is none of true, false", s)
	}
	*to = s == "true"
	return nil
}

// Seccomp is a seccomp profile: RuntimeDefault, Unconfined, or one of the node's by its path below the kubelet's folder. It is
// a flag value.
type Seccomp string

func (p *Seccomp) String() string { return string(*p) }

func (p *Seccomp) Set(s string) error {
	if path, ok := strings.CutPrefix(s, localhost); s != "RuntimeDefault" && s != "Unconfined" && (!ok || path == "") {
		return fmt.Errorf("%q is none of RuntimeDefault, Unconfined, %sPATH", s, localhost)
	}
	*p = Seccomp(s)
	return nil
}

// localhost begins a profile of the node's.
const localhost = "Localhost/"

// Type names the value in help texts.
func (p *Seccomp) Type() string { return "RuntimeDefault|Unconfined|Localhost/PATH" }

func (p Seccomp) node() *yaml.Node {
	if path, ok := strings.CutPrefix(string(p), localhost); ok {
		return mapping(pair{"type", str("Localhost")}, pair{"localhostProfile", str(path)})
	}
	return mapping(pair{"type", str(string(p))})
}

// Setting is a flag of `pillion init` or `pillion proxy`.
type Setting struct {
	Init, Proxy bool               // whose it is
	Check       func(string) error // parses a value
}

// Settings say what is written. An annotation of the pod, AnnotationPrefix and a name, has the last word on each.
type Settings struct {
	Image         string // of the sidecar
	InitImage     string // of the init container; empty: Image, with "-iptables" behind it for UnprivilegedProxy
	Variant       Variant
	Sidecar       Form
	InitSeccomp   Seccomp // of the init container, but for Privileged
	CPURequest    Quantity
	CPULimit      Quantity
	MemoryRequest Quantity
	MemoryLimit   Quantity
	NodeName      bool // the init container is told its node's name, for what it says when it fails

	Known  map[string]Setting // what init and proxy may be told, by the names of their flags
	Values map[string]string  // what they are told
	// Configure reads flags as init and proxy would. Its error is what they refuse of them beyond what the configurations find
	// wrong themselves. Where it is nil they have their defaults, whatever they are told.
	Configure func(init, proxy map[string]string) (Told, error)

	told Told                  // of one pod
	by   map[string]*yaml.Node // its annotations, by the names of the settings
}

// Default is what `pillion inject` writes without being told otherwise.
func Default() Settings {
	return Settings{Variant: Privileged, Sidecar: Native, InitSeccomp: "RuntimeDefault", CPURequest: "10m", MemoryRequest: "40Mi", NodeName: true, Known: map[string]Setting{}, Values: map[string]string{}}
}

// AnnotationPrefix begins the annotations that are read from a pod.
const AnnotationPrefix = "pillion.dev/"

// own are the settings that are neither init's nor proxy's.
func (s *Settings) own() map[string]func(string) error {
	image := func(to *string) func(string) error {
		return func(v string) error {
			if v == "" || strings.ContainsAny(v, " \t\n") {
				return fmt.Errorf("%q is no image", v)
			}
			*to = v
			return nil
		}
	}
	return map[string]func(string) error{
		"image": image(&s.Image), "init-image": image(&s.InitImage), "variant": s.Variant.Set, "sidecar": s.Sidecar.Set, "init-seccomp": s.InitSeccomp.Set,
		"cpu-request": s.CPURequest.Set, "cpu-limit": s.CPULimit.Set, "memory-request": s.MemoryRequest.Set, "memory-limit": s.MemoryLimit.Set,
		"node-name": func(v string) error { return setBool(&s.NodeName, v) },
	}
}

// key is the same for settings of which the same is written.
func (s Settings) key() string {
	return fmt.Sprintf("%q", []any{s.Image, s.InitImage, s.Variant, s.Sidecar, s.InitSeccomp, s.CPURequest, s.CPULimit, s.MemoryRequest, s.MemoryLimit, s.NodeName, s.Values})
}

// of are the settings for one pod; wanted is false where an annotation says that it wants none of it.
func (s Settings) of(d *document, t template) (its Settings, wanted bool, err error) {
	s.Values, s.by = maps.Clone(s.Values), make(map[string]*yaml.Node)
	own := s.own()
	wanted = true
	var f faults
	for _, a := range fields(find(t.metadata, "annotations")) {
		key, value := a.key, a.value
		name, ours := strings.CutPrefix(key.Value, AnnotationPrefix)
		if !ours {
			continue
		}
		known, ok := s.Known[name]
		check := known.Check
		switch {
		case name == "inject":
			switch value.Value {
			case "true", "enabled":
			case "false", "disabled":
				wanted = false
			default:
				f.add(d, value, "write true or false, in quotes", "annotation %s: %q", key.Value, value.Value)
			}
			continue
		case own[name] != nil:
			check = own[name]
		case !ok:
			f.add(d, key, "there are: "+strings.Join(s.names(own), ", "), "annotation %s: unknown", key.Value)
			continue
		}
		if value.Kind != yaml.ScalarNode || value.Tag != "!!str" {
			f.add(d, value, "put it in quotes", "annotation %s: must be a string", key.Value)
			continue
		}
		if err := errors.Join(printable(value.Value), check(value.Value)); err != nil {
			f.add(d, value, "", "annotation %s: %v", key.Value, err)
			continue
		}
		s.by[name] = value
		if own[name] == nil {
			s.Values[name] = value.Value
		}
	}
	if err := f.err(); err != nil || !wanted {
		return s, false, err
	}
	s.told, err = s.configure(d, t)
	return s, true, err
}

func (s Settings) names(own map[string]func(string) error) []string {
	names := append(slices.Collect(maps.Keys(own)), "inject")
	return slices.Sorted(slices.Values(append(names, slices.Collect(maps.Keys(s.Known))...)))
}

// printable refuses what would end a line of the manifest.
func printable(value string) error {
	if strings.ContainsFunc(value, unicode.IsControl) {
		return fmt.Errorf("%q: has control characters in it", value)
	}
	return nil
}

// SetImages sets the image of the sidecar and that of the init container; the second may be empty.
func (s *Settings) SetImages(sidecar, init string) error {
	if err := s.own()["image"](sidecar); err != nil {
		return fmt.Errorf("--image: %w", err)
	}
	if init == "" {
		s.InitImage = ""
		return nil
	}
	if err := s.own()["init-image"](init); err != nil {
		return fmt.Errorf("--init-image: %w", err)
	}
	return nil
}

// Set gives a setting of init or proxy its value.
func (s *Settings) Set(name, value string) error {
	if err := errors.Join(printable(value), s.Known[name].Check(value)); err != nil {
		return err
	}
	s.Values[name] = value
	return nil
}
