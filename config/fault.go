// SPDX-License-Identifier: Apache-2.0

package config

import "errors"

// Exit codes of the program, after sysexits.h where it has one that fits.
const (
	ExitFailure     = 1  // what was asked for could not be done, or is not so (status, verify)
	ExitUsage       = 64 // EX_USAGE: an unknown flag or verb, a missing argument
	ExitUnavailable = 69 // EX_UNAVAILABLE: the kernel or the host lacks what is needed
	ExitNoPerm      = 77 // EX_NOPERM: a capability is missing
	ExitConfig      = 78 // EX_CONFIG: a value that cannot be right
)

// Fault is an error as its reader needs it: what happened (Err), what to do about it (Hint, may be empty), and the exit
// code of a program that ends with it (0 counts as ExitFailure).
type Fault struct {
	Err  error
	Hint string
	Exit int
}

func (f *Fault) Error() string { return f.Err.Error() }

func (f *Fault) Unwrap() error { return f.Err }

// HintOf is the hint of the outermost Fault in the chain of err that has one.
func HintOf(err error) string {
	for f := (*Fault)(nil); errors.As(err, &f); err = f.Err {
		if f.Hint != "" {
			return f.Hint
		}
	}
	return ""
}

// ExitOf is the exit code that err asks for: that of the outermost Fault in its chain that names one, else ExitFailure;
// 0 for nil.
func ExitOf(err error) int {
	if err == nil {
		return 0
	}
	for f := (*Fault)(nil); errors.As(err, &f); err = f.Err {
		if f.Exit != 0 {
			return f.Exit
		}
	}
	return ExitFailure
}
