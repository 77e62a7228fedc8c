// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"

	"github.com/pillionproxy/pillion/config"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func newRootCommand(e *env) *cobra.Command {
	root := &cobra.Command{
		Use:   "pillion",
		Short: "A transparent networking sidecar that never rewrites an address",
		Long: `Pillion carries an app's TCP traffic through a sidecar without changing the app, its configuration or its addresses.

  pillion run -- COMMAND   capture one command on this machine
  pillion init             install the capture for a cgroup (a pod, a service) and exit
  pillion proxy            the sidecar itself`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return cmd.Help()
		},
	}
	root.SetIn(e.stdin)
	root.SetOut(e.stdout)
	root.SetErr(e.stderr)
	root.AddCommand(verbs(e)...)
	for _, cmd := range append(root.Commands(), root) {
		asUsageErrors(cmd)
		fromEnvironment(e, cmd)
	}
	return root
}

// asUsageErrors makes wrong flags and arguments end with ExitUsage.
func asUsageErrors(cmd *cobra.Command) {
	usage := func(err error) error {
		return &config.Fault{Err: err, Exit: config.ExitUsage, Hint: fmt.Sprintf("%q lists what there is", cmd.CommandPath()+" --help")}
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usage(err) })
	if check := cmd.Args; check != nil {
		cmd.Args = func(c *cobra.Command, args []string) error {
			if err := check(c, args); err != nil {
				return usage(err)
			}
			return nil
		}
	}
}

// fromEnvironment gives every flag that the command line does not set the value of PILLION_<FLAG>, if there is one.
func fromEnvironment(e *env, cmd *cobra.Command) {
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) (err error) {
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			name := "PILLION_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
			value := e.getenv(name)
			if f.Changed || value == "" || err != nil {
				return
			}
			if serr := f.Value.Set(value); serr != nil {
				err = &config.Fault{
					Err:  fmt.Errorf("environment variable %s: %w", name, serr),
					Hint: fmt.Sprintf("it is used in place of --%s; unset it or give it a %s", f.Name, f.Value.Type()),
					Exit: config.ExitConfig,
				}
			}
		})
		return err
	}
}

// sharedFlags binds what init, proxy, status and clean must agree on.
func sharedFlags(f *pflag.FlagSet, s *config.Shared) {
	f.Uint16Var(&s.Listeners.Outbound, "outbound-port", s.Listeners.Outbound, "port of the proxy's outbound listener")
	f.Uint16Var(&s.Listeners.Inbound, "inbound-port", s.Listeners.Inbound, "port of the proxy's inbound listener")
	f.Uint16Var(&s.Listeners.InboundOwn, "inbound-own-port", s.Listeners.InboundOwn, "port of the inbound listener for apps whose listeners carry a mark")
	f.Var(&s.DialOutbound, "dial-outbound", "ports from which the proxy dials for the app")
	f.Var(&s.DialInbound, "dial-inbound", "ports from which the proxy dials to the app")
}

// invalid turns what Validate found into a fault.
func invalid(err error) error {
	if err == nil {
		return nil
	}
	return &config.Fault{Err: err, Exit: config.ExitConfig, Hint: "--help says what each flag may be"}
}
