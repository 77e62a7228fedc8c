// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillionproxy/pillion/test/testnet"
)

// node is a network namespace in which podman runs pods.
type node struct {
	t       *testing.T
	ns      *testnet.Namespace
	network string
}

// Addresses of pods on a node: the first is the node's own.
const subnet4, subnet6 = "10.89.0.", "fd89::"

// newNode makes a node with a bridge of both families. When the test ends nothing is left of it.
func newNode(t *testing.T) *node {
	t.Helper()
	testnet.NeedRoot(t)
	for _, program := range [][2]string{
		{"podman", "podman"},
		{ociRuntime(), "runc"},
		{"conmon", "conmon"},
		{"/usr/lib/podman/netavark", "netavark"},
		{"nginx", "nginx-light"},
		{"curl", "curl"},
		{"busybox", "busybox-static"},
		{"iptables-nft", "iptables"},
	} {
		testnet.NeedProgram(t, program[0], program[1])
	}
	if err := build(); err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, ns: testnet.New(t).Namespace("node")}
	n.network = n.ns.Name
	if err := pods.configure(n.network); err != nil {
		t.Fatal(err)
	}
	n.ns.Up("lo")
	n.must(n.podman("network", "create", "--ipv6", "--disable-dns", "--subnet", subnet4+"0/24", "--subnet", subnet6+"/64", n.network))
	t.Cleanup(func() { n.must(n.podman("network", "rm", "--force", n.network)) })
	return n
}

// result is what a program that has ended said.
type result struct {
	args   []string
	code   int
	stdout string
	out    string // both of its outputs, one behind the other
}

// run runs a command in the node's network namespace.
func (n *node) run(stdin string, name string, args ...string) result {
	n.t.Helper()
	cmd := n.ns.Command(nil, name, args...)
	cmd.Dir = filepath.Join(pods.dir, "work") // kube play looks for folders with the names of images
	cmd.Env = pods.environ(n.network)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	if err := cmd.Run(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		n.t.Fatalf("%v: %v", cmd.Args, err)
	}
	return result{cmd.Args, cmd.ExitCode(), stdout.String(), stdout.String() + stderr.String()}
}

func (n *node) podman(args ...string) result {
	n.t.Helper()
	return n.run("", "podman", args...)
}

// must fails the test unless the program ended with 0, and returns what it said.
func (n *node) must(r result) string {
	n.t.Helper()
	if r.code != 0 {
		n.t.Fatalf("%s: exit code %d\n%s", strings.Join(r.args, " "), r.code, r.out)
	}
	return r.out
}

// pod is one that kube play made.
type pod struct {
	*node
	name     string
	manifest string // file
	ip4, ip6 string
}

// play runs a manifest as the pod of the node with a number, which is its address too. The pod's own name gets the node's
// in front.
func (n *node) play(number int, name, manifest string) (*pod, result) {
	n.t.Helper()
	p := &pod{
		node: n, name: n.network + "-" + name, manifest: filepath.Join(pods.dir, "work", n.network+"-"+name+".yaml"),
		ip4: fmt.Sprint(subnet4, number), ip6: fmt.Sprint(subnet6, number),
	}
	// podman 4.3 knows seccomp profiles by the annotation that came before them alone.
	metadata := "name: " + p.name
	if strings.Contains(manifest, "type: Unconfined") {
		metadata += "\n  annotations: {seccomp.security.alpha.kubernetes.io/pod: unconfined}"
	}
	writeFile(n.t, p.manifest, strings.ReplaceAll(manifest, "name: POD", metadata))
	n.t.Cleanup(p.remove)
	r := n.podman("kube", "play", fmt.Sprintf("--network=%s:ip=%s,ip6=%s", n.network, p.ip4, p.ip6), p.manifest)
	return p, r
}

// remove ends the pod at once.
func (p *pod) remove() {
	if r := p.podman("pod", "rm", "--force", "--ignore", "--time=0", p.name); r.code != 0 {
		p.t.Errorf("%v: %s", r.args, r.out)
	}
}

// down ends the pod as kubectl delete would: SIGTERM, and the grace period.
func (p *pod) down() {
	p.t.Helper()
	p.must(p.podman("kube", "down", p.manifest))
}

// container is the name that podman gives to a container of the pod.
func (p *pod) container(name string) string { return p.name + "-" + name }

// exec runs a program in a container.
func (p *pod) exec(container string, args ...string) result {
	p.t.Helper()
	return p.podman(append([]string{"exec", p.container(container)}, args...)...)
}

// curl asks from the container "app" and returns what came, behind it the addresses that curl saw.
func (p *pod) curl(url string, args ...string) result {
	p.t.Helper()
	args = append([]string{"/usr/bin/curl", "-sS", "--max-time", "20", "-w", `%{local_ip} to %{remote_ip}:%{remote_port}\n`}, args...)
	return p.exec("app", append(args, url)...)
}

// logs are what a container wrote.
func (p *pod) logs(container string) string {
	p.t.Helper()
	return readLog(p.t, p.logFile(container))
}

func (p *pod) logFile(container string) string {
	p.t.Helper()
	return strings.TrimSpace(p.must(p.podman("container", "inspect", "--format={{.HostConfig.LogConfig.Path}}", p.container(container))))
}

// readLog reads what a runtime wrote as Kubernetes has it, TIME STREAM F|P TEXT: a text with P goes on in the next line.
func readLog(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for line := range strings.Lines(string(b)) {
		if fields := strings.SplitN(line, " ", 4); len(fields) == 4 {
			if fields[2] == "P" {
				fields[3] = strings.TrimSuffix(fields[3], "\n")
			}
			text.WriteString(fields[3])
		}
	}
	return text.String()
}

// waitLog waits until a container has written something.
func (p *pod) waitLog(container, what string) {
	p.t.Helper()
	file := p.logFile(container)
	testnet.Wait(p.t, fmt.Sprintf("%s writes %q", p.container(container), what), func() bool {
		return strings.Contains(readLog(p.t, file), what)
	})
}

// inspected is what podman knows of a container.
type inspected struct {
	State struct {
		Status   string
		Pid      int
		ExitCode int
	}
	RestartCount int
}

func (p *pod) inspect(container string) inspected {
	p.t.Helper()
	var list []inspected
	if err := json.Unmarshal([]byte(p.must(p.podman("inspect", p.container(container)))), &list); err != nil || len(list) != 1 {
		p.t.Fatalf("podman inspect %s: %d containers, %v", p.container(container), len(list), err)
	}
	return list[0]
}

// waitStatus waits until a container is in a state: running, exited.
func (p *pod) waitStatus(container, status string) inspected {
	p.t.Helper()
	var i inspected
	testnet.Wait(p.t, fmt.Sprintf("%s is %s", p.container(container), status), func() bool {
		i = p.inspect(container)
		return i.State.Status == status
	})
	return i
}

// state is all that pods could leave in the node's network namespace; what else they could leave is looked for when all tests
// are over: see store.remove.
type state struct {
	testnet.Snapshot
	Filters    []string // of packet filters
	Containers string
}

// netavarkOwn are chains that podman's network leaves when its last pod is gone.
func netavarkOwn(line string) bool { return strings.Contains(line, "NETAVARK") }

func (n *node) state() state {
	n.t.Helper()
	s := state{Snapshot: n.ns.Snapshot(nil), Containers: n.must(n.podman("ps", "--all", "--pod", "--format", "{{.PodName}} {{.Names}}", "--filter", "network="+n.network))}
	for _, tool := range []string{"iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save", "ip6tables-legacy-save"} {
		for line := range strings.Lines(n.must(n.run("", tool))) {
			if strings.HasPrefix(line, "-A") && !netavarkOwn(line) || strings.Contains(line, "PILLION") {
				s.Filters = append(s.Filters, tool+" "+line)
			}
		}
	}
	return s
}
