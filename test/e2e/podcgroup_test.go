// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/test/testnet"
)

// layout is where a kubelet and a runtime put a pod and a container of it. Words with $ are replaced: see (layout).fill.
type layout struct{ name, pod, container string }

var layouts = []layout{
	{"cgroupfs", "kubepods/burstable/pod$UID", "$ID"},
	{"cgroupfs, guaranteed", "kubepods/pod$UID", "$ID"},
	{"cgroupfs, static pod", "kubepods/besteffort/pod$HEX", "$ID"},
	{"cgroupfs, static pod with a uid of its own", "kubepods/burstable/podproxy-$NAME", "crio-$ID"},
	{"cgroupfs, a container that is called like a pod", "kubepods/burstable/pod$UID", "pod$OUTER"},
	{"systemd, containerd", "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod$U_ID.slice", "cri-containerd-$ID.scope"},
	{"systemd, CRI-O, guaranteed", "kubepods.slice/kubepods-pod$U_ID.slice", "crio-$ID.scope"},
	{"systemd, static pod, one more level", "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod$HEX.slice", "crio-$ID.scope/container"},
	{"systemd, cgroup root", "own.slice/own-kubepods.slice/own-kubepods-pod$U_ID.slice", "cri-containerd-$ID.scope"},
	{"kind, cgroupfs", "docker/$HOST/kubelet/kubepods/burstable/pod$UID", "$ID/container"},
	{"kind, systemd", "system.slice/docker-$HOST.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod$U_ID.slice", "cri-containerd-$ID.scope"},
	{"kind in a pod", "kubepods/burstable/pod$OUTER/$HOST/kubelet/kubepods/pod$UID", "$ID"},
	{"kind in a pod, systemd in cgroupfs", "kubepods/pod$OUTER/$HOST/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod$U_ID.slice", "crio-$ID.scope/container"},
	{"podman, cgroupfs", "libpod_parent/$POD", "libpod-$ID"},
	{"podman, cgroup parent", "shop/$POD", "libpod-$ID/container"},
	{"podman, systemd", "machine.slice/machine-libpod_pod_$POD.slice", "libpod-$ID.scope/container"},
}

// fill replaces the words of a name: of the pod with that number, and the container with that name.
func fill(template string, pod int, container string) string {
	const uid = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1%02x"
	ours := fmt.Sprintf(uid, pod)
	id := fmt.Sprintf("%x", container)
	return strings.NewReplacer(
		"$UID", ours, "$U_ID", strings.ReplaceAll(ours, "-", "_"), "$HEX", strings.ReplaceAll(ours, "-", ""), "$NAME", fmt.Sprint(pod),
		"$POD", fmt.Sprintf("%064x", pod+1), "$HOST", strings.Repeat("ab", 32), "$ID", id+strings.Repeat("0", 64-len(id)),
		"$OUTER", fmt.Sprintf(uid, 0x80+len(id)),
	).Replace(template)
}

// laidPod is a pod in a layout, on a node whose hierarchy begins at node. Nothing is installed.
type laidPod struct {
	*pod
	node   *testnet.Cgroup
	layout layout
	number int
}

func newLaidPod(t *testing.T, node *testnet.Cgroup, l layout, number int) *laidPod {
	t.Helper()
	p := &laidPod{pod: newPod(t), node: node, layout: l, number: number}
	if node == nil {
		p.node = p.net.Cgroup("node")
	}
	p.cg = p.node.Existing(fill(l.pod, number, ""))
	p.appCG, p.initCG, p.proxyCG = p.container("app"), p.container("init"), p.container("proxy")
	p.app = p.ns.Agent(p.appCG)
	return p
}

// container makes the cgroup of a container.
func (p *laidPod) container(name string, below ...string) *testnet.Cgroup {
	p.t.Helper()
	template := p.layout.container
	if strings.Contains(template, "$OUTER") {
		template = strings.ReplaceAll(template, "$OUTER", "$OUTER"+name)
	}
	cg := p.cg.Existing(filepath.Join(append([]string{fill(template, p.number, name)}, below...)...))
	if err := os.MkdirAll(cg.Path, 0o755); err != nil {
		p.t.Fatal(err)
	}
	return cg
}

// root is the node's hierarchy, whole, as it is mounted here.
func (p *laidPod) root() string { return filepath.Dir(p.node.Path) }

// captured cgroups are all on the node that have programs.
func (p *laidPod) capturedCgroups() (list []string) {
	p.t.Helper()
	err := filepath.WalkDir(p.node.Path, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			name, err := filepath.Rel(p.node.Path, path)
			if err != nil {
				return err
			}
			if len(p.node.Existing(name).Programs()) > 0 {
				list = append(list, path)
			}
		}
		return nil
	})
	if err != nil {
		p.t.Fatal(err)
	}
	return list
}

// wantCaptured fails the test unless that cgroup is captured, and no other on the node; "" stands for none.
func (p *laidPod) wantCaptured(t *testing.T, when, path string) {
	t.Helper()
	var want []string
	if path != "" {
		want = []string{path}
	}
	if got := p.capturedCgroups(); !slices.Equal(got, want) {
		t.Errorf("%s: captured are %q, want %q", when, got, want)
	}
}

// view is what an init container sees of the cgroups, beside PID and mount namespaces of its own.
type view struct {
	name    string
	private bool   // a cgroup namespace of its own
	before  string // shell, while /sys is the host's
	mounts  string // shell: $KEEP is the host's hierarchy, $HOST an empty folder
	caps    string // of setpriv; "" for all
	foundBy string
}

// Pieces of a view.
const (
	ownMount  = "mount -t cgroup2 none /sys/fs/cgroup; mount -o remount,bind,ro /sys/fs/cgroup\n"
	hostMount = "mount --bind $KEEP $HOST; mount -o remount,bind,ro $HOST\n"
	// version1 is a hierarchy of version 1: one of the host, or where that has none, one without controllers.
	version1    = "if [ \"$V1\" ]; then mount --bind $V1 $HOST; else mount -t cgroup -o none,name=pillion none $HOST; fi\n"
	hostInPlace = "mount --bind $KEEP /sys/fs/cgroup; mount -o remount,bind,ro /sys/fs/cgroup\n"

	least   = "+cap_39,+cap_12" // CAP_BPF, CAP_NET_ADMIN
	search  = least + ",+cap_2" // CAP_DAC_READ_SEARCH
	byName  = "own cgroup namespace path"
	byInode = "inode of the own cgroup"
	byIDs   = "told by the kernel"
)

// views are those that every layout is tried with.
var views = []view{
	{"the host's cgroup namespace", false, "", ownMount, least, byName},
	{"a private one, and the host's hierarchy mounted", true, "", ownMount + hostMount, least, byInode},
	{"a private one alone", true, "", ownMount, search, byIDs},
}

// moreViews are those that depend on no layout.
var moreViews = []view{
	{"the host's hierarchy mounted before the own", true, "", hostMount + ownMount, least, byInode},
	{"the host's hierarchy in the usual place", true, "", hostInPlace, least, byInode},
	{"the host's hierarchy mounted over the own", true, "", ownMount + hostInPlace, least, byInode},
	{"the own mounted over the host's hierarchy", true, "", hostInPlace + "mount -t cgroup2 none $HOST; mount --bind $HOST /sys/fs/cgroup; umount $HOST\n", search, byIDs},
	{"the host's namespace, its hierarchy elsewhere", false, "", hostMount, least, byName},
	{"nothing mounted, privileged", true, "", "", "", byIDs},
	{"nothing mounted, the host's namespace, privileged", false, "", "", "", byName},
	{"the own twice", true, "", ownMount + "mount --bind /sys/fs/cgroup $HOST\n", search, byIDs},
	{
		"the process below the root of its namespace", true, "",
		"mount -t cgroup2 none /sys/fs/cgroup; mkdir -p /sys/fs/cgroup/init/a; echo 0 >/sys/fs/cgroup/init/a/cgroup.procs\n" + hostMount, least, byInode,
	},
	{
		"the process below the root of its namespace, told by the kernel", true, "",
		"mount -t cgroup2 none /sys/fs/cgroup; mkdir -p /sys/fs/cgroup/init; echo 0 >/sys/fs/cgroup/init/cgroup.procs\n", search, byIDs,
	},
}

// in prepares pillion as a container with that view would run it.
func (p *laidPod) in(cg *testnet.Cgroup, v view, args ...string) *testnet.Cmd {
	p.t.Helper()
	dir := p.t.TempDir()
	keep, host := filepath.Join(dir, "keep"), filepath.Join(dir, "host")
	for _, d := range []string{keep, host} {
		if err := os.Mkdir(d, 0o755); err != nil {
			p.t.Fatal(err)
		}
	}
	v1 := firstV1Mount(p.t)
	enter := "" // after v.before: where cgroup namespaces are private nobody makes a hierarchy of version 1
	if v.private {
		enter = "unshare --cgroup "
	}
	script := "mount -t proc proc /proc; mount --bind $ROOT $KEEP; umount -l -R /sys; mount -t sysfs none /sys\n" + v.mounts + "umount $KEEP\nexec "
	if v.caps != "" {
		script += "setpriv --no-new-privs --inh-caps=-all --bounding-set=-all," + v.caps + " "
	}
	cmd := p.ns.Command(cg, "unshare", append([]string{
		"--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "/bin/sh", "-euc",
		v.before + "exec " + enter + `/bin/sh -euc "$0" sh "$@"`, script + `"$@"`, pillionPath,
	}, args...)...)
	cmd.Env = append(os.Environ(), "PILLION_NODE=worker-7", "V1="+v1, "ROOT="+p.root(), "KEEP="+keep, "HOST="+host)
	return cmd
}

// firstV1Mount is where a hierarchy of version 1 is mounted, "" on hosts without.
func firstV1Mount(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if left, right, _ := strings.Cut(line, " - "); strings.HasPrefix(right, "cgroup ") {
			return strings.Fields(left)[4]
		}
	}
	return ""
}

// initIn runs init with that view of a container.
func (p *laidPod) initIn(v view, args ...string) result {
	p.t.Helper()
	return run(p.t, p.in(p.initCG, v, append([]string{"init", "--backend=ebpf"}, args...)...))
}

// outAndIn are one path in each direction, with that process at the end in the pod.
func (p *laidPod) outAndIn(from *testnet.Agent) []path {
	p.t.Helper()
	ways := p.paths()
	return by(from, []path{ways[0], ways[3]})
}

// findsItsPod runs init with a view, twice, and checks that it captured this pod, whole, and nothing else.
func (p *laidPod) findsItsPod(t *testing.T, v view, neighbour *laidPod) {
	t.Helper()
	r := p.initIn(v)
	must(t, "init", r)
	if !strings.HasPrefix(r.stdout, "captured ") || !strings.Contains(r.stdout, v.foundBy) {
		t.Errorf("init says %q, want found by %q", r.stdout, v.foundBy)
	}
	if p.wantCaptured(t, "after init", p.cg.Path); t.Failed() {
		return // each connection would wait in vain
	}
	for _, w := range p.outAndIn(p.ns.Agent(p.container("later"))) {
		p.captured(t, w)
	}
	if neighbour != nil {
		for _, w := range neighbour.outAndIn(neighbour.app) {
			neighbour.direct(t, w)
		}
	}
	r = p.initIn(v)
	must(t, "the second init", r)
	if !strings.HasPrefix(r.stdout, "captured already ") {
		t.Errorf("the second init says %q", r.stdout)
	}
	must(t, "clean", p.clean())
	p.wantCaptured(t, "after clean", "")
}

// TestPodCgroup: init finds its own pod and nothing else, whatever the kubelet and the runtime call it.
func TestPodCgroup(t *testing.T) {
	for _, l := range layouts {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			p := newLaidPod(t, nil, l, 1)
			neighbour := newLaidPod(t, p.node, l, 2)
			p.startProxy(inside)
			for _, v := range views {
				t.Run(v.name, func(t *testing.T) { p.findsItsPod(t, v, neighbour) })
			}
		})
	}
}

// TestPodCgroupViews: the same, whatever a container sees of the hierarchy.
func TestPodCgroupViews(t *testing.T) {
	t.Parallel()
	p := newLaidPod(t, nil, layouts[7], 1)
	p.startProxy(inside)
	for _, v := range moreViews {
		t.Run(v.name, func(t *testing.T) { p.findsItsPod(t, v, nil) })
	}
	part := view{"a part of the hierarchy", true, "", ownMount + "mount --bind $KEEP/" + filepath.Base(p.node.Path) + "/kubepods.slice $HOST\n", least, byInode}
	t.Run(part.name, func(t *testing.T) { p.findsItsPod(t, part, nil) })
}

// TestPodCgroupTwoPods: two pods of a node are captured by themselves, each by its own sidecar.
func TestPodCgroupTwoPods(t *testing.T) {
	t.Parallel()
	a := newLaidPod(t, nil, layouts[5], 1)
	b := newLaidPod(t, a.node, layouts[5], 2)
	for _, p := range []*laidPod{a, b} {
		must(t, "init", p.initIn(views[p.number]))
		p.startProxy(inside)
	}
	if got, want := a.capturedCgroups(), []string{a.cg.Path, b.cg.Path}; !slices.Equal(got, want) {
		t.Errorf("captured are %q, want %q", got, want)
	}
	for _, p := range []*laidPod{a, b, a} {
		for _, w := range p.outAndIn(p.app) {
			p.captured(t, w)
		}
	}
	must(t, "clean", a.clean())
	a.wantCaptured(t, "after the first pod's clean", b.cg.Path)
	for _, w := range a.outAndIn(a.app) {
		a.direct(t, w)
	}
	for _, w := range b.outAndIn(b.app) {
		b.captured(t, w)
	}
	must(t, "clean", b.clean())
}

// TestPodCgroupLaterContainers: what is made in the pod after init is captured, however deep, and however often.
func TestPodCgroupLaterContainers(t *testing.T) {
	t.Parallel()
	p := newLaidPod(t, nil, layouts[0], 1)
	must(t, "init", p.initIn(views[1]))
	p.startProxy(inside)
	for round := range 3 { // a container that is restarted has a new cgroup, of the same name here
		for _, below := range [][]string{nil, {"container"}, {"docker", "kubepods", "deep"}} {
			cg := p.container("later", below...)
			agent := p.ns.Agent(cg)
			for _, w := range p.outAndIn(agent) {
				p.captured(t, w)
			}
			agent.Kill()
		}
		if err := os.Remove(p.container("later", "container").Path); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		for _, below := range [][]string{{"docker", "kubepods", "deep"}, {"docker", "kubepods"}, {"docker"}, nil} {
			cg := p.container("later", below...)
			testnet.Wait(t, cg.Path+" is removed", func() bool { return os.Remove(cg.Path) == nil })
		}
	}
	p.wantCaptured(t, "in the end", p.cg.Path)
	must(t, "clean", p.clean())
}

// TestPodCgroupNotFound: where init cannot know its pod it captures nothing, and the last line that it writes, which the
// kubelet shows, says what is missing, where, and what to change.
func TestPodCgroupNotFound(t *testing.T) {
	t.Parallel()
	kubelet := layouts[7]
	docker := layout{"", "system.slice", "docker-$ID.scope"}
	service := layout{"", "system.slice", "containerd.service"}
	mixed := layout{"", "system.slice/containerd.service", "kubepods-burstable-pod$U_ID.slice:cri-containerd:$ID"}
	for _, tt := range []struct {
		name   string
		layout layout
		view   view
		code   int
		says   string // anywhere
		last   []string
	}{
		{"no CAP_DAC_READ_SEARCH", kubelet, view{private: true, mounts: ownMount, caps: least}, config.ExitNoPerm, "operation not permitted", []string{"CAP_DAC_READ_SEARCH", "seccomp", "hostPath"}},
		{"nothing mounted", kubelet, view{private: true, caps: least}, config.ExitUnavailable, "cgroup2 mounts: none", []string{"no cgroup2 is mounted", "hostPath"}},
		{"nothing mounted, the host's namespace", kubelet, view{caps: least}, config.ExitUnavailable, "own cgroup: /plt-", []string{"no cgroup2 is mounted", "hostPath"}},
		{"version 1 alone is mounted", kubelet, view{private: true, before: version1, caps: least}, config.ExitUnavailable, "version 1 mounts: 1", []string{"only version 1", "hostPath", "unified_cgroup_hierarchy", "--backend tproxy"}},
		{"the runtime uses version 1 alone", service, view{before: version1, mounts: ownMount, caps: least}, config.ExitUnavailable, "containerd.service has no pod above it", []string{"version 1 cgroups alone", "unified_cgroup_hierarchy"}},
		{"in the root cgroup, version 1", layout{"", "..", "."}, view{before: version1, mounts: ownMount, caps: least}, config.ExitUnavailable, "cgroup / has no pod", []string{"version 1 cgroups alone", "unified_cgroup_hierarchy"}},
		{"in the root cgroup", layout{"", "..", "."}, view{mounts: ownMount, caps: least}, config.ExitUnavailable, "cgroup / has no pod", []string{"--cgroup"}},
		{"the drivers differ", mixed, view{mounts: ownMount, caps: least}, config.ExitUnavailable, "has no pod above it", []string{"cgroup driver", "SystemdCgroup"}},
		{"the drivers differ, private", mixed, view{private: true, mounts: ownMount, caps: search}, config.ExitUnavailable, "has no pod above it", []string{"cgroup driver", "SystemdCgroup"}},
		{"no pod", docker, view{mounts: ownMount, caps: least}, config.ExitUnavailable, "has no pod above it", []string{"--cgroup"}},
		{"no pod, the host's hierarchy mounted", docker, view{private: true, mounts: ownMount + hostMount, caps: least}, config.ExitUnavailable, "has no pod above it", []string{"--cgroup"}},
		{"no pod, told by the kernel", docker, view{private: true, mounts: ownMount, caps: search}, config.ExitUnavailable, "has no pod above it", []string{"--cgroup"}},
		{"no pod between the kubelet's cgroups", layout{"", "kubepods/burstable", "$ID"}, view{mounts: ownMount, caps: least}, config.ExitUnavailable, "has no pod above it", []string{"--cgroup"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newLaidPod(t, nil, tt.layout, 1)
			before := p.ns.Snapshot(nil)
			r := p.initIn(tt.view)
			if r.code != tt.code || !strings.Contains(r.stderr, tt.says) {
				t.Errorf("exit code %d, want %d, and %q in\n%s", r.code, tt.code, tt.says, r.stderr)
			}
			lines := strings.Split(strings.TrimSpace(r.stderr), "\n")
			for _, s := range append(tt.last, "on node worker-7: ") {
				if last := lines[len(lines)-1]; !strings.Contains(last, s) {
					t.Errorf("the last line is %q, want %q in it", last, s)
				}
			}
			p.wantCaptured(t, "after the refusal", "")
			same(t, "after the refusal", before, p.ns.Snapshot(nil))
		})
	}
}

// TestPodCgroupAuto: a container that cannot know its pod is captured by packet filters, and told why.
func TestPodCgroupAuto(t *testing.T) {
	t.Parallel()
	testnet.NeedProgram(t, "iptables-nft", "iptables")
	for _, v := range []view{
		{name: "no CAP_DAC_READ_SEARCH", private: true, mounts: ownMount, foundBy: "CAP_DAC_READ_SEARCH"},
		{name: "version 1 alone", private: true, before: version1, foundBy: "under no cgroup2 mount"},
	} {
		t.Run(v.name, func(t *testing.T) {
			v.caps = least + ",+cap_13" // CAP_NET_RAW, for iptables
			p := newLaidPod(t, nil, layouts[5], 1)
			r := run(t, p.in(p.initCG, v, "init"))
			must(t, "init", r)
			for _, s := range []string{"# not by ebpf: ", v.foundBy, "captured this network namespace", "backend tproxy"} {
				if !strings.Contains(r.stdout, s) {
					t.Errorf("init does not say %q:\n%s", s, r.stdout)
				}
			}
			p.wantCaptured(t, "after init", "")
			p.startProxy(inside)
			for _, w := range p.outAndIn(p.ns.Agent(p.container("later"))) {
				p.captured(t, w)
			}
			p.by = filterBackends[0]
			must(t, "clean", p.clean())
		})
	}
}
