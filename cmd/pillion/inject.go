// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/aymanbagabas/go-udiff"
	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/deploy/inject"
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

Variants: privileged runs the init container as most meshes do; least gives it two capabilities and the view of the cgroup
tree; unprivileged-proxy takes the backend redirect, with which the sidecar has no capability at all, and the app sees its
own address in place of the client's.`,
		Example: `  pillion inject deployment.yaml | kubectl apply -f -
  kubectl get deploy shop -o json | pillion inject --variant least - | kubectl apply -f -
  pillion inject --diff --exclude-outbound-ports 5432 manifests/
  pillion inject --in-place manifests/*.yaml`,
		RunE: func(_ *cobra.Command, args []string) error {
			return w.run(e, args, func(file string, text []byte) ([]byte, error) { return inject.Inject(file, text, s) })
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
	podSettings(e, f, &s)
	w.flags(f)
	return cmd
}

func newUninjectCommand(e *env) *cobra.Command {
	var w rewriting
	cmd := &cobra.Command{
		Use:   "uninject [flags] [FILE|DIRECTORY|-]...",
		Short: "Take the sidecar out of Kubernetes manifests",
		Long:  `Take out of manifests what "pillion inject" wrote, and give back the text that it was given, byte for byte.`,
		Example: `  pillion uninject --in-place manifests/
  kubectl get deploy shop -o json | pillion uninject - | kubectl apply -f -`,
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

func (s *settingFlag) Set(v string) error {
	if err := s.settings.Known[s.name].Check(v); err != nil {
		return err
	}
	s.settings.Values[s.name] = v
	return nil
}

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

// run changes all manifests, or none of them.
func (w *rewriting) run(e *env, args []string, change func(string, []byte) ([]byte, error)) error {
	usage := func(format string, a ...any) error {
		return &config.Fault{Err: fmt.Errorf(format, a...), Exit: config.ExitUsage}
	}
	switch {
	case len(args) == 0 && isTerminalInput(e.stdin):
		return &config.Fault{Err: errors.New("no manifest"), Hint: "name files or directories, or - for standard input", Exit: config.ExitUsage}
	case len(args) == 0:
		args = []string{"-"}
	case w.inPlace && slices.Contains(args, "-"):
		return usage("--in-place: standard input cannot be written back")
	}
	if w.inPlace && w.output != "" {
		return usage("--in-place and --output: give one of them")
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
			io.WriteString(e.stdout, udiff.Unified(m.name, m.name, string(m.text), string(to[i])))
		}
		return nil
	}
	if !w.inPlace {
		all := joined(to)
		if w.output != "" {
			return replaceFile(w.output, all)
		}
		_, err = e.stdout.Write(all)
		return err
	}
	for i, m := range from {
		if string(to[i]) == string(m.text) {
			continue
		}
		if err := replaceFile(m.name, to[i]); err != nil {
			return err
		}
		fmt.Fprintln(e.stdout, m.name)
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
		err := filepath.WalkDir(a, func(path string, entry fs.DirEntry, err error) error {
			hidden := path != a && strings.HasPrefix(entry.Name(), ".")
			switch {
			case err != nil:
				return err
			case entry.IsDir() && hidden:
				return fs.SkipDir
			case entry.IsDir(), hidden, path != a && !slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(path)):
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
	}
	return list, nil
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
			if !strings.HasPrefix(string(t), "---") {
				all = append(all, "---\n"...)
			}
		}
		all = append(all, t...)
	}
	return all
}

// replaceFile writes a file whole or not at all, where a link leads to, with the mode that it had.
func replaceFile(name string, text []byte) (err error) {
	if real, err := filepath.EvalSymlinks(name); err == nil {
		name = real
	}
	mode := fs.FileMode(0o644)
	if info, err := os.Stat(name); err == nil {
		mode = info.Mode().Perm()
	}
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, werr := f.Write(text)
	if err := errors.Join(werr, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}
