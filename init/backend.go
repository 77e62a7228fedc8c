// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/ebpf"
	"github.com/pillionproxy/pillion/redirect/iptables"
)

// Backend names a way to capture. It is a flag value.
type Backend string

// The backends.
const (
	Auto     Backend = "auto" // the first of the others that this host allows
	EBPF     Backend = ebpf.Name
	TProxy   Backend = iptables.TProxy
	Redirect Backend = iptables.Redirect
)

func (b Backend) String() string { return string(b) }

// Set parses a backend by its name.
func (b *Backend) Set(s string) error {
	switch Backend(s) {
	case Auto, EBPF, TProxy, Redirect:
		*b = Backend(s)
		return nil
	}
	return fmt.Errorf("%q is none of auto, ebpf, tproxy, redirect", s)
}

// Type names the value in help texts.
func (b *Backend) Type() string { return "auto|ebpf|tproxy|redirect" }

// capturer is a backend as it is driven here. Each method but plan runs under the redirect.Lock.
type capturer interface {
	name() Backend
	plan(ctx context.Context, o Options) (p redirect.Plan, foundBy string, err error)
	install(ctx context.Context, o Options) (Result, error)
	verify(ctx context.Context, policy config.Capture) ([]redirect.Check, error)
	remove(ctx context.Context, cgroup string) error
	// previous is the policy that is installed now; nil if there is none, or if it may not be read.
	previous(ctx context.Context, policy config.Capture) (p *config.Capture, found bool, err error)
}

func capturerOf(b Backend) capturer {
	if b == EBPF {
		return ebpfCapturer{}
	}
	return filterCapturer{b}
}

// first tries the backends that the options allow until one succeeds. A backend that is installed already stays.
func first(o Options, try func(capturer) (Result, error)) (Result, error) {
	if o.Backend != Auto && o.Backend != "" {
		return try(capturerOf(o.Backend))
	}
	if o.Policy.Cgroup != "" {
		return try(ebpfCapturer{}) // the others know no cgroups
	}
	if isHostNamespace() {
		r, err := try(ebpfCapturer{})
		if err == nil {
			return r, nil
		}
		return r, &config.Fault{Err: err, Hint: strings.TrimPrefix(config.HintOf(err)+
			"; or capture all of this host by packet filters, which is not done unasked: --backend tproxy, or redirect", "; ")}
	}
	candidates := []Backend{EBPF, TProxy, Redirect}
	var refused []Refusal
	var errs []error
	for _, b := range candidates {
		r, err := try(capturerOf(b))
		if err == nil {
			r.Refused = refused
			return r, nil
		}
		if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, errTaken) {
			return r, err
		}
		refused = append(refused, Refusal{b, err.Error(), config.HintOf(err)})
		errs = append(errs, fmt.Errorf("%s: %w", b, err))
	}
	lines := make([]string, len(refused))
	for i, r := range refused {
		lines[i] = fmt.Sprintf("\n  %s: %s", r.Backend, r.Reason)
		if r.Hint != "" {
			lines[i] += "\n    " + r.Hint
		}
	}
	return Result{Refused: refused}, &config.Fault{
		Err: fmt.Errorf("no backend can capture here:%s", strings.Join(lines, "")),
		Hint: fmt.Sprintf("for %s (%s): %s; `pillion check` shows what each backend needs, and what this host offers",
			refused[0].Backend, refused[0].Reason, cmp.Or(refused[0].Hint, "the host cannot")),
		Exit: config.ExitOf(errs[0]),
	}
}

// errTaken says that a capture by another backend is installed.
var errTaken = errors.New("this network namespace is captured already by another backend")

// taken refuses to install one backend over another of another kind.
func taken(reports []redirect.Report) error {
	if len(reports) == 0 {
		return nil
	}
	clean := "pillion clean"
	if reports[0].Cgroup != "" {
		clean += " --cgroup " + reports[0].Cgroup
	}
	return &config.Fault{
		Err:  fmt.Errorf("%w: %s", errTaken, reports[0].Backend),
		Hint: fmt.Sprintf("take it away first (`%s`), or name it with --backend", clean),
	}
}

// isHostNamespace reports whether this may be the network namespace of the host itself: the first process that we see
// shares it, and is the host's; or a network device of the hardware is here.
func isHostNamespace() bool {
	const initialPIDNamespace = "pid:[4026531836]" // PROC_PID_INIT_INO in include/linux/proc_ns.h
	first, err := os.Readlink("/proc/1/ns/net")
	if ns, perr := os.Readlink("/proc/self/ns/pid"); err == nil && perr == nil && ns == initialPIDNamespace {
		ours, err := os.Readlink("/proc/self/ns/net")
		return err != nil || ours == first
	}
	links, err := os.ReadDir("/sys/class/net")
	if err != nil {
		return true
	}
	for _, l := range links {
		if _, err := os.Stat("/sys/class/net/" + l.Name() + "/device"); err == nil {
			return true
		}
	}
	return false
}
