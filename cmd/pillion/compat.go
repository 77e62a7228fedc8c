// SPDX-License-Identifier: Apache-2.0

package main

import (
	"log/slog"
	"strings"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/config/compat"
	"github.com/spf13/pflag"
)

// applyCompat puts what another system's variables say into the policy, but for the flags that were given, and logs what
// became of each. backend is the backend that they wish for, or "". A value that is malformed, or that asks for what
// Pillion cannot do, is an error: nothing is left out silently.
func applyCompat(environ []string, system string, policy *config.Capture, given func(flag string) bool, log *slog.Logger) (backend string, err error) {
	r, err := compat.FromEnvironment(system, environ)
	if err != nil {
		return "", err
	}
	for _, f := range r.Findings {
		if f.Effect == compat.Mapped {
			log.Info("compat: mapped", "name", f.Name, "value", f.Value, "flags", strings.Join(f.Flags, " "), "note", f.Reason)
		} else if f.Effect == compat.Ignored {
			log.Info("compat: ignored", "name", f.Name, "value", f.Value, "reason", f.Reason)
		}
	}
	if err := r.Refused(); err != nil {
		return "", err
	}
	for _, flag := range r.Apply(policy, given) {
		log.Info("compat: a flag of our own wins", "flag", "--"+flag)
	}
	if given("backend") {
		return "", nil
	}
	return r.Backend, nil
}

// givenFlags reports whether a flag has a value of its own, from the command line or from PILLION_<FLAG>.
func givenFlags(e *env, f *pflag.FlagSet) func(flag string) bool {
	return func(flag string) bool {
		return f.Changed(flag) || e.getenv("PILLION_"+strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))) != ""
	}
}
