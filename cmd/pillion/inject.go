// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/aymanbagabas/go-udiff"
	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/deploy/inject"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/ebpf"
	"github.com/pillionproxy/pillion/redirect/iptables"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func newInjectCommand(e *env) *cobra.Command {
	s := inject.Default()
	s.Image = "pillion:" + versionString()
	var w rewriting
	cmd := &cobra.Command{
		Use:   "inject [flags] [FILE|DIRECTORY|-]...",
		Short: "Write the sidecar into Kubernetes manifests",
		Long: `Write the init container and the sidecar into every pod of Kubernetes manifests, YAML or JSON: Pod, Deployment, StatefulSet,
DaemonSet, ReplicaSet, Job, CronJob, and lists of them. Everything else passes as it is, byte for byte, comments and all;
"pillion uninject" gives back the very text. Injecting again writes what the present settings say.

Each flag of "pillion init" and "pillion proxy" that makes sense in a pod can be given, for all pods here, or for one pod as
an annotation of its template: pillion.dev/exclude-outbound-ports: "5432". pillion.dev/inject: "false" leaves a pod alone.
What the two containers would refuse when they start is refused here. Warnings, as of pods whose kind is not known, go to
standard error.

Variants: privileged runs the init container as most meshes do; least gives it two capabilities and the view of the cgroup
tree; unprivileged-proxy takes the backend redirect, with which the sidecar has no capability at all, and the app sees its
own address in place of the client's.`,
		Example: `  pillion inject deployment.yaml | kubectl apply -f -
  kubectl get deploy shop -o json | pillion inject --variant least - | kubectl apply -f -
  pillion inject --diff --exclude-outbound-ports 5432 manifests/
  pillion inject --in-place manifests/*.yaml`,
		RunE: func(_ *cobra.Command, args []string) error {
			if err := s.SetImages(s.Image, s.InitImage); err != nil {
				return &config.Fault{Err: err, Exit: config.ExitUsage}
			}
			if err := s.Validate(); err != nil {
				return &config.Fault{Err: err, Exit: config.ExitUsage}
			}
			return w.run(e, args, func(file string, text []byte) ([]byte, error) {
				injected, warnings, err := inject.Inject(file, text, s)
				for _, w := range warnings {
					warn(e.stderr, w)
				}
				return injected, err
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&s.Image, "image", s.Image, "image of the sidecar")
	f.StringVar(&s.InitImage, "init-image", "", "image of the init container (default: --image; with unprivileged-proxy the one with iptables, -iptables behind it)")
	f.Var(&s.Variant, "variant", "with what rights the two containers run")
	f.Var(&s.Sidecar, "sidecar", "native (Kubernetes 1.29 or newer), or an ordinary container")
	f.Var(&s.InitSeccomp, "init-seccomp", "seccomp profile of the init container, but for privileged; runtimes before containerd 1.7 and CRI-O 1.27 forbid bpf(2) by default")
	f.Var(&s.CPURequest, "cpu-request", "CPU that each of the two asks for")
	f.Var(&s.CPULimit, "cpu-limit", "CPU that each of the two may have")
	f.Var(&s.MemoryRequest, "memory-request", "memory that each of the two asks for")
	f.Var(&s.MemoryLimit, "memory-limit", "memory that each of the two may have")
	f.BoolVar(&s.NodeName, "node-name", true, "tell the init container its node's name, for its errors; podman kube play cannot: --node-name=false")
	podSettings(e, f, &s)
	s.Configure = func(init, proxy map[string]string) (inject.Told, error) { return configure(e, init, proxy) }
	w.flags(f)
	return cmd
}

// warn prints a warning as errors are printed.
func warn(to io.Writer, w inject.Warning) {
	fmt.Fprintf(to, "pillion: warning: %s\n", w.Text)
	if w.Hint != "" {
		fmt.Fprintf(to, "  hint: %s\n", w.Hint)
	}
}

func newUninjectCommand(e *env) *cobra.Command {
	var w rewriting
	cmd := &cobra.Command{
		Use:   "uninject [flags] [FILE|DIRECTORY|-]...",
		Short: "Take the sidecar out of Kubernetes manifests",
		Long: `Take out of manifests what "pillion inject" wrote, and give back the text that it was given, byte for byte. A manifest
that another program has written anew since, as the API server does, is refused: it is not that text any more.`,
		Example: `  pillion uninject --in-place manifests/
  pillion uninject --diff deployment.yaml`,
		RunE: func(_ *cobra.Command, args []string) error { return w.run(e, args, inject.Uninject) },
	}
	w.flags(cmd.Flags())
	return cmd
}

// notInPods are flags of init and proxy that are for people at a terminal, or name what a pod has one of.
var notInPods = []string{"cgroup", "exclude-cgroups", "compat", "dry-run", "confirm", "output", "help", "log-format"}

// podSettings makes every other flag of init and proxy a setting, and a flag here.
func podSettings(e *env, f *pflag.FlagSet, s *inject.Settings) {
	for _, verb := range []struct {
		make func(*env) *cobra.Command
		mark func(*inject.Setting)
	}{
		{newInitCommand, func(k *inject.Setting) { k.Init = true }},
		{newProxyCommand, func(k *inject.Setting) { k.Proxy = true }},
	} {
		verb.make(e).Flags().VisitAll(func(its *pflag.Flag) {
			if slices.Contains(notInPods, its.Name) {
				return
			}
			k := s.Known[its.Name]
			verb.mark(&k)
			k.Check = func(value string) error { return verb.make(e).Flags().Lookup(its.Name).Value.Set(value) }
			s.Known[its.Name] = k
			if f.Lookup(its.Name) == nil {
				v := f.VarPF(&settingFlag{its.Name, its.Value.Type(), s}, its.Name, "", its.Usage)
				v.DefValue, v.NoOptDefVal = its.DefValue, its.NoOptDefVal
			}
		})
	}
}

// configure reads what the two containers are told by their own parsers. What is wrong with the configurations by themselves
// is left to their Validate.
func configure(e *env, init, proxy map[string]string) (inject.Told, error) {
	capture, initErr := toldInit(e, init)
	sidecar, proxyErr := toldProxy(e, proxy)
	return inject.Told{Init: capture, Proxy: sidecar}, errors.Join(initErr, proxyErr)
}

// toldInit is what init would install. Beyond Validate it refuses what no host allows: a backend that cannot do what is asked
// of it.
func toldInit(e *env, values map[string]string) (config.Capture, error) {
	c := config.DefaultCapture()
	bound := pflag.NewFlagSet("init", pflag.ContinueOnError)
	captureFlags(bound, &c)
	all := newInitCommand(e).Flags()
	if err := setFlags(values, all, bound); err != nil {
		return c, err
	}
	if timeout, err := all.GetDuration("timeout"); err != nil || timeout <= 0 {
		return c, errors.Join(err, fmt.Errorf("--timeout %s: must be positive", timeout))
	}
	switch backend := all.Lookup("backend").Value.String(); backend {
	case ebpf.Name:
		return c, ebpf.Supports(c)
	case iptables.TProxy, iptables.Redirect:
		_, err := iptables.Plan(backend, c, redirect.Host{}, iptables.Tools{Tracked: true})
		if config.ExitOf(err) == config.ExitConfig { // and not that there is no packet filter here
			return c, err
		}
	}
	return c, nil
}

// toldProxy is what proxy would run with, but for its log.
func toldProxy(e *env, values map[string]string) (config.Proxy, error) {
	p := config.DefaultProxy()
	bound := pflag.NewFlagSet("proxy", pflag.ContinueOnError)
	sharedFlags(bound, &p.Shared)
	bound.Var((*slotFlag)(&p.Slot), "slot", "")
	all := newProxyCommand(e).Flags()
	errs := []error{setFlags(values, all, bound)}
	of := func(name string) pflag.Value { return all.Lookup(name).Value }
	p.Listen = config.Listen(of("listen").String())
	p.Admin, p.Health = netip.AddrPort(*of("admin").(*addrFlag)), netip.AddrPort(*of("health").(*addrFlag))
	var err error
	p.ConnectTimeout, err = all.GetDuration("connect-timeout")
	errs = append(errs, err)
	p.IdleTimeout, err = all.GetDuration("idle-timeout")
	errs = append(errs, err)
	p.DrainTimeout, err = all.GetDuration("drain-timeout")
	errs = append(errs, err)
	p.MaxConnections, err = all.GetInt("max-connections")
	return p, errors.Join(append(errs, err)...)
}

// setFlags gives values to the flags of a verb, and to those of them that are bound elsewhere too.
func setFlags(values map[string]string, all, bound *pflag.FlagSet) error {
	var errs []error
	for name, v := range values {
		errs = append(errs, all.Set(name, v))
		if bound.Lookup(name) != nil {
			errs = append(errs, bound.Set(name, v))
		}
	}
	return errors.Join(errs...)
}

// settingFlag is a flag of init or proxy, checked by their own parser.
type settingFlag struct {
	name, kind string
	settings   *inject.Settings
}

func (s *settingFlag) String() string {
	if s.settings == nil { // pflag asks a zero value for its default
		return ""
	}
	return s.settings.Values[s.name]
}

func (s *settingFlag) Set(v string) error { return s.settings.Set(s.name, v) }

func (s *settingFlag) Type() string { return s.kind }

// rewriting is what becomes of manifests.
type rewriting struct {
	inPlace, diff bool
	output        string
}

func (w *rewriting) flags(f *pflag.FlagSet) {
	f.BoolVarP(&w.inPlace, "in-place", "i", false, "write each file back, if it changes")
	f.BoolVar(&w.diff, "diff", false, "show what would change, and write nothing")
	f.StringVarP(&w.output, "output", "o", "", "write to this file (default: standard output)")
}

// mostBytes is the largest manifest that is read: larger ones are no manifests.
const mostBytes = 64 << 20

// manifest is a file and its text.
type manifest struct {
	name string // "-": standard input
	text []byte
}

// run changes all manifests, or none of them if one cannot be read, changed or written.
func (w *rewriting) run(e *env, args []string, change func(string, []byte) ([]byte, error)) error {
	usage := func(format string, a ...any) error {
		return &config.Fault{Err: fmt.Errorf(format, a...), Exit: config.ExitUsage}
	}
	switch {
	case len(args) == 0 && isTerminalInput(e.stdin):
		return &config.Fault{Err: errors.New("no manifest"), Hint: "name files or directories, or - for standard input", Exit: config.ExitUsage}
	case len(args) == 0:
		args = []string{"-"}
	}
	if w.inPlace && slices.Contains(args, "-") {
		return usage("--in-place: standard input cannot be written back")
	}
	if w.inPlace && w.output != "" || w.diff && (w.inPlace || w.output != "") {
		return usage("--in-place, --output and --diff: give one of them")
	}
	from, err := readManifests(e.stdin, args)
	if err != nil {
		return err
	}
	to := make([][]byte, len(from))
	var errs []error
	for i, m := range from {
		if to[i], err = change(m.name, m.text); err != nil {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if w.diff {
		for i, m := range from {
			if _, err := io.WriteString(e.stdout, udiff.Unified(m.name, m.name, string(m.text), string(to[i]))); err != nil {
				return err
			}
		}
		return nil
	}
	if !w.inPlace {
		all := joined(to)
		if w.output != "" {
			r, err := replace(w.output, all)
			if err != nil {
				return err
			}
			return r.commit()
		}
		_, err = e.stdout.Write(all)
		return err
	}
	var all []replacement
	defer func() {
		for _, r := range all {
			r.drop()
		}
	}()
	for i, m := range from {
		if string(to[i]) == string(m.text) {
			continue
		}
		r, err := replace(m.name, to[i])
		if err != nil {
			return &config.Fault{Err: err, Hint: "no manifest was changed"}
		}
		all = append(all, r)
	}
	for _, r := range all {
		if err := r.commit(); err != nil {
			return err
		}
		fmt.Fprintln(e.stdout, r.name)
	}
	return nil
}

func isTerminalInput(r io.Reader) bool {
	f, ok := r.(*os.File)
	return ok && isTerminal(f)
}

// readManifests reads files, all manifests below directories, and standard input.
func readManifests(stdin io.Reader, args []string) (list []manifest, err error) {
	for _, a := range args {
		if a == "-" {
			text, err := readAll(stdin, "standard input")
			if err != nil {
				return nil, err
			}
			list = append(list, manifest{"-", text})
			continue
		}
		found := len(list)
		root := a
		info, err := os.Stat(a)
		if err == nil && info.IsDir() {
			root = filepath.Clean(a) + "/" // a link to a folder is followed
		}
		err = filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
			hidden := path != root && strings.HasPrefix(entry.Name(), ".")
			switch {
			case err != nil:
				return err
			case entry.IsDir() && hidden:
				return fs.SkipDir
			case entry.IsDir(), hidden, path != root && !isFile(path), path != root && !slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(path)):
				return nil
			}
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			defer f.Close()
			text, err := readAll(f, path)
			list = append(list, manifest{path, text})
			return err
		})
		if err != nil {
			return nil, &config.Fault{Err: err, Exit: config.ExitConfig}
		}
		if len(list) == found {
			return nil, &config.Fault{Err: fmt.Errorf("%s: no manifest in it", a), Hint: "manifests in a folder end with .yaml, .yml or .json", Exit: config.ExitConfig}
		}
	}
	return list, nil
}

// isFile reports whether something is a file, or leads to one: a pipe would be waited for.
func isFile(path string) bool {
	info, err := os.Stat(path)
	return err != nil || info.Mode().IsRegular()
}

func readAll(r io.Reader, name string) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(r, mostBytes+1))
	if err == nil && len(text) > mostBytes {
		err = &config.Fault{Err: fmt.Errorf("%s: more than %d MiB", name, mostBytes>>20), Hint: "is it a manifest? Split it", Exit: config.ExitConfig}
	}
	return text, err
}

// joined makes one stream of several.
func joined(texts [][]byte) []byte {
	var all []byte
	for _, t := range texts {
		if len(all) > 0 && len(t) > 0 {
			if all[len(all)-1] != '\n' {
				all = append(all, '\n')
			}
			t = bytes.TrimPrefix(t, []byte("\ufeff")) // it begins no file any more
			switch {
			case bytes.HasPrefix(t, []byte("---")):
			case bytes.HasPrefix(t, []byte("%")): // directives stand behind the end of a document
				all = append(all, "...\n"...)
			default:
				all = append(all, "---\n"...)
			}
		}
		all = append(all, t...)
	}
	return all
}

// replacement is a file that is written, and not yet in its place.
type replacement struct {
	name     string // as the user has it
	from, to string
}

// replace prepares to write a file whole or not at all, where a link leads to, with the mode and the owner that it had. What
// is no file, as /dev/stdout, and what was not there, is written at once.
func replace(name string, text []byte) (r replacement, err error) {
	r = replacement{name: name, to: name}
	if real, err := filepath.EvalSymlinks(name); err == nil {
		r.to = real
	}
	info, err := os.Stat(r.to)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return replacement{name: name}, writeNew(name, text)
	case err != nil:
		return r, err
	case !info.Mode().IsRegular():
		return replacement{name: name}, os.WriteFile(r.to, text, 0)
	}
	f, err := os.CreateTemp(filepath.Dir(r.to), ".pillion-")
	if err != nil {
		return r, err
	}
	r.from = f.Name()
	_, werr := f.Write(text)
	owner := info.Sys().(*syscall.Stat_t)
	_ = f.Chown(int(owner.Uid), int(owner.Gid)) // who may not give files away makes it his own
	err = errors.Join(werr, f.Chmod(info.Mode().Perm()), f.Sync(), f.Close())
	if err != nil {
		r.drop()
	}
	return r, err
}

// writeNew writes a file that was not there, nor a link of its name, with the mode that new files have here.
func writeNew(name string, text []byte) error {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o666)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(name)
	}
	return err
}

func (r replacement) commit() error {
	if r.from == "" {
		return nil
	}
	return os.Rename(r.from, r.to)
}

// drop removes what was not put in its place.
func (r replacement) drop() {
	if r.from != "" {
		_ = os.Remove(r.from)
	}
}
