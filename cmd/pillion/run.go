// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/pillionproxy/pillion/config"
	bootstrap "github.com/pillionproxy/pillion/init"
	"github.com/pillionproxy/pillion/proxy"
	"github.com/pillionproxy/pillion/redirect/rootless"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// runOptions are the flags of `pillion run`.
type runOptions struct {
	policy   config.Capture
	proxy    config.Proxy
	report   reportOptions
	netns    string
	noVerify bool
	waitAll  bool
	verbose  bool
	backend  runBackend
	mapRoot  bool
	dryRun   bool
	publish  publications
	allPorts bool // of the command are published
}

func newRunCommand(e *env) *cobra.Command {
	o := runOptions{policy: config.DefaultCapture(), proxy: config.DefaultProxy()}
	o.proxy.Admin, o.proxy.Health = netip.AddrPort{}, netip.AddrPort{}
	o.report.format, o.backend = "auto", "auto"
	cmd := &cobra.Command{
		Use:   "run [flags] -- COMMAND [ARGUMENTS]",
		Short: "Run one command with its traffic captured",
		Long: `Run a command captured, with the sidecar inside this process; and show, when it has ended, the connections that it made
and took. Nothing stays behind.

With root's rights the command runs in a cgroup of its own (backend ebpf), and what it does not do over TCP is not touched.
Without them it runs in a user and a network namespace of its own (backend rootless): it sees the same addresses, and reaches
by TCP and UDP what this host reaches, "localhost" being its own listeners first and this host's next. Differently from
without it: sudo, ping and other programs that gain rights do not; abstract Unix sockets (some of X11 and D-Bus) are out of
reach; others connect to its listeners by --publish and --publish-all alone; processes outside are not seen.

The command keeps its terminal, signals, directory, environment and exit status; started by sudo it runs as the user who
called sudo. It ends with the capture: processes that it left in the background are ended too, unless --wait-all waits for
them. The exit status is the command's: 126 if it could not be started, 127 if it was not found, 128 and the signal's
number if a signal ended it.`,
		Example: `  pillion run -- curl -s https://example.com
  sudo pillion run --follow -- ssh example.com
  pillion run --publish 127.0.0.1:8080 -- python3 -m http.server 8080
  sudo pillion run --netns blue --report json --report-file out.json -- make test`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := invalid(errors.Join(o.policy.Validate(), o.proxy.Validate())); err != nil {
				return err
			}
			if o.backend.rootless(o) {
				return runRootless(e, o, args, cmd.Flags())
			}
			if o.mapRoot || o.dryRun || len(o.publish) > 0 || o.allPorts {
				return &config.Fault{
					Err:  errors.New("--publish, --publish-all, --map-root and --dry-run are for the backend rootless"),
					Hint: "leave it out: the command's listeners are this host's; or take --backend rootless",
					Exit: config.ExitUsage,
				}
			}
			if err := bootstrap.RequireCapabilities(); err != nil {
				return err
			}
			if o.netns != "" {
				return enterNetworkNamespace(o.netns, runAgain(cmd, args))
			}
			return runCommand(cmd.Context(), e, o, args)
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false)
	policyFlags(f, &o.policy)
	selectionFlags(f, &o.policy.Selection)
	f.Var(&o.report.format, "report", "what to print at the end, on standard error: auto is a table on a terminal, else nothing")
	f.StringVar(&o.report.file, "report-file", "", "write the report to this file instead")
	f.BoolVar(&o.report.follow, "follow", false, "print each connection as it opens and closes")
	f.StringVar(&o.netns, "netns", "", "run in this network namespace: a name (ip netns), a path, or a process id")
	f.DurationVar(&o.proxy.ConnectTimeout, "connect-timeout", o.proxy.ConnectTimeout, "how long a dial may take")
	f.DurationVar(&o.proxy.IdleTimeout, "idle-timeout", o.proxy.IdleTimeout, "reset TCP connections on which nothing was passed on for so long (0: none)")
	f.Var((*addrFlag)(&o.proxy.Admin), "admin", "loopback address of the admin interface, or none")
	f.Var((*addrFlag)(&o.proxy.Health), "health", "address of health probes and metrics, or none")
	f.BoolVar(&o.noVerify, "no-verify", false, "do not prove the capture by connections")
	f.BoolVar(&o.waitAll, "wait-all", false, "wait for the processes that the command leaves in the background")
	f.Var(&o.backend, "backend", "how to capture; auto is ebpf where this process has the rights for it, else rootless")
	f.Var(&o.publish, "publish", "rootless: let others connect to a port that the command listens on, at an address of this host (default: all), by this or another port")
	f.BoolVar(&o.allPorts, "publish-all", false, "rootless: let programs of this host connect to every port that the command listens on, at this host's loopback addresses")
	f.BoolVar(&o.mapRoot, "map-root", false, "rootless: the command sees itself as root, with rights in its own namespaces alone")
	f.BoolVar(&o.dryRun, "dry-run", false, "rootless: print what would be done, as commands, and do nothing")
	f.BoolVarP(&o.verbose, "verbose", "v", false, "print what the sidecar says")
	return cmd
}

// runAgain is the command line of this very run without --netns.
func runAgain(cmd *cobra.Command, args []string) []string {
	argv := []string{"pillion", "run"}
	cmd.Flags().Visit(func(f *pflag.Flag) {
		if f.Name != "netns" {
			argv = append(argv, "--"+f.Name+"="+f.Value.String())
		}
	})
	return append(append(argv, "--"), args...)
}

// runCommand captures, runs, reports. Every step is undone before it returns, in reverse.
func runCommand(ctx context.Context, e *env, o runOptions, args []string) (err error) {
	path, err := lookCommand(args[0])
	if err != nil {
		return err
	}
	group, err := newCommandGroup()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, group.remove()) }()

	log := slog.New(slog.DiscardHandler)
	if o.verbose {
		var flush func()
		log, flush = newQueuedLogger(e.stderr, "text", slog.LevelInfo)
		defer flush()
	}
	seen := newRecorder(e.stderr, o.report.follow)
	sidecar := &embedded{cfg: o.proxy, log: log, seen: seen}
	defer sidecar.stop()

	o.policy.Cgroup = group.path
	options := bootstrap.Options{Policy: o.policy, Verify: !o.noVerify, Log: log}
	e.forTests(&options)
	held, err := bootstrap.Hold(ctx, options, sidecar.start)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, held.Close()) }()

	seen.begin()
	status, err := group.run(e, path, args)
	if err != nil {
		return err
	}
	if err := group.end(e.stderr, o.waitAll); err != nil {
		return err
	}
	sidecar.stop()
	if err := o.report.write(e.stderr, seen.connections()); err != nil {
		return err
	}
	return exitStatus(status)
}

// embedded is the sidecar inside this process.
type embedded struct {
	cfg  config.Proxy
	log  *slog.Logger
	seen *recorder
	end  func() // drains and waits; nil before start
}

// start opens the listeners on free ports and begins to serve. It is called with the slot of the capture.
func (s *embedded) start(slot config.Slot) (config.Shared, error) {
	cfg := s.cfg
	cfg.Slot = slot
	cfg.Listeners = config.Listeners{}
	cfg.DrainTimeout = drainAfterCommand
	server, err := proxy.Listen(proxy.Config{Proxy: cfg, Log: s.log, Observer: s.seen})
	if err != nil {
		return config.Shared{}, err
	}
	s.end = serveInside(server, s.log)
	cfg.Listeners = server.Listeners()
	return cfg.Shared, nil
}

// stop drains and waits. It may be called again, and where start was not.
func (s *embedded) stop() {
	if s.end != nil {
		s.end()
	}
}

// drainAfterCommand is how long connections may go on when every process of the command has ended: only what is in the
// kernel's buffers is still under way.
const drainAfterCommand = 2 * time.Second

// serveInside serves in the background until stop is called, which drains and waits, and may be called again.
func serveInside(server *proxy.Server, log *slog.Logger) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := server.Serve(ctx); err != nil {
			log.Error("the sidecar ended", "error", err)
		}
	})
	return func() {
		cancel()
		serving.Wait()
	}
}

// reportFormat is the flag --report.
type reportFormat string

func (r *reportFormat) String() string { return string(*r) }

func (r *reportFormat) Set(s string) error {
	switch s {
	case "auto", "table", "json", "none":
		*r = reportFormat(s)
		return nil
	}
	return fmt.Errorf("%q is none of auto, table, json, none", s)
}

func (r *reportFormat) Type() string { return "auto|table|json|none" }

// runBackend is the flag --backend of run.
type runBackend string

func (b *runBackend) String() string { return string(*b) }

func (b *runBackend) Set(s string) error {
	switch s {
	case "auto", string(bootstrap.EBPF), rootless.Name:
		*b = runBackend(s)
		return nil
	}
	return fmt.Errorf("%q is none of auto, ebpf, rootless", s)
}

func (b *runBackend) Type() string { return "auto|ebpf|rootless" }

// rootless reports whether the backend is, or is to be, the one that takes no rights.
func (b runBackend) rootless(o runOptions) bool {
	switch b {
	case rootless.Name:
		return true
	case "auto":
		return o.mapRoot || bootstrap.RequireCapabilities() != nil
	}
	return false
}

// enterNetworkNamespace runs the program again in another network namespace: a namespace belongs to a thread, and only
// exec gives a process of many threads a single one. It returns only on failure.
func enterNetworkNamespace(name string, argv []string) error {
	if err := setNetworkNamespace(name); err != nil {
		return &config.Fault{
			Err:  fmt.Errorf("--netns %s: %w", name, err),
			Hint: "give a name that `ip netns` lists, the path of a namespace file, or a process id; it takes CAP_SYS_ADMIN",
			Exit: config.ExitConfig,
		}
	}
	err := execSelf(argv)
	return fmt.Errorf("run again in network namespace %s: %w", name, err)
}

// namespacePath is the file of a network namespace.
func namespacePath(name string) string {
	switch {
	case strings.Contains(name, "/"):
		return name
	case strings.Trim(name, "0123456789") == "":
		return "/proc/" + name + "/ns/net"
	}
	return "/run/netns/" + name
}

// openNamespace opens the file of a network namespace.
func openNamespace(name string) (*os.File, error) { return os.Open(namespacePath(name)) }
