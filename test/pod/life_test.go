// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pillionproxy/pillion/test/testnet"
)

// pair is a captured client on a node that has a web pod without a sidecar.
func pair(t *testing.T, args ...string) (client, web *pod) {
	t.Helper()
	n := newNode(t)
	web = n.plain(2, "web")
	return n.start(3, "client", n.inject("client", args...)), web
}

// plain plays testdata/NAME.yaml as it is.
func (n *node) plain(number int, name string) *pod {
	n.t.Helper()
	p, r := n.play(number, name, n.read(name))
	n.must(r)
	p.waitStatus("app", "running")
	return p
}

// asked is a program in a container that is under way.
type asked struct {
	*testnet.Cmd
	out *testnet.Lines
}

// ask starts a program in a container.
func (p *pod) ask(container string, args ...string) asked {
	p.t.Helper()
	cmd := p.ns.Command(nil, "podman", append([]string{"exec", p.container(container)}, args...)...)
	a := asked{cmd, new(testnet.Lines)}
	cmd.Env, cmd.Stdout, cmd.Stderr = pods.environ(p.network), a.out, a.out
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	return a
}

// end waits for it and fails the test unless it ended with the code.
func (a asked) end(t *testing.T, code int) {
	t.Helper()
	_ = a.Wait()
	if got := a.ExitCode(); got != code {
		t.Errorf("%v: exit code %d, want %d\n%s", a.Args, got, code, a.out)
	}
}

// Exit codes of curl(1).
const (
	curlConnect = 7
	curlTimeout = 28
	curlReset   = 56
)

// TestAppFirst: an app that connects before its sidecar is there waits for it.
func TestAppFirst(t *testing.T) {
	t.Parallel()
	client, web := pair(t)
	client.must(client.podman("stop", client.container("pillion")))
	a := client.ask("app", "/usr/bin/curl", "-sS", "--max-time", "60", "http://"+web.ip4)
	client.waitSYN(web.ip4)
	client.must(client.podman("start", client.container("pillion")))
	a.end(t, 0)
	client.waitLog("pillion", `"destination":"`+web.ip4+`:80"`)
}

// waitSYN waits until an app of the pod has sent a SYN twice.
func (p *pod) waitSYN(to string) {
	p.t.Helper()
	testnet.Wait(p.t, "the app waits for its sidecar", func() bool {
		for line := range strings.Lines(p.exec("app", "/bin/busybox", "cat", "/proc/net/tcp").out) {
			f := strings.Fields(line)
			if len(f) > 6 && f[3] == "02" && f[6] != "00000000" { // SYN_SENT, and its retransmissions
				return true
			}
		}
		return false
	})
}

// TestSidecarKilled: what becomes of the app's connections is what the policy says, whoever killed the sidecar.
func TestSidecarKilled(t *testing.T) {
	signal := func(p *pod) { p.must(p.podman("kill", "--signal=KILL", p.container("pillion"))) }
	for _, tt := range []struct {
		policy, killer string
		kill           func(*pod)
		code           int // of an app that connects
	}{
		{"hold", "a signal", signal, curlTimeout},
		{"closed", "a signal", signal, curlConnect},
		{"open", "a signal", signal, 0},
		{"closed", "the kernel, out of memory", (*pod).starve, curlConnect},
	} {
		t.Run(tt.policy+", by "+tt.killer, func(t *testing.T) {
			t.Parallel()
			client, web := pair(t, "--on-proxy-down="+tt.policy)
			load := client.ask("app", "/usr/bin/curl", "-sS", "-o", "/dev/null", "http://"+web.ip4+"/trickle")
			testnet.Wait(t, "the transfer is under way", func() bool {
				return strings.Contains(client.must(client.run("", "curl", "-fsS", "http://"+client.ip4+":16020/metrics")), `pillion_connections_open{direction="outbound",protocol="tcp"} 1`)
			})
			tt.kill(client)
			if i := client.waitStatus("pillion", "exited"); i.State.ExitCode != 128+int(unix.SIGKILL) {
				t.Errorf("the sidecar ended with %d", i.State.ExitCode)
			}
			load.end(t, curlReset)
			client.ask("app", "/usr/bin/curl", "-sS", "--max-time", "3", "http://"+web.ip4).end(t, tt.code)
			client.must(client.podman("start", client.container("pillion")))
			client.must(client.curl("http://" + web.ip4))
		})
	}
}

// starve takes away all memory of the sidecar's cgroup that it is not using, so that the kernel kills it when it asks for more.
func (p *pod) starve() {
	p.t.Helper()
	pid := p.inspect("pillion").State.Pid
	file := memoryLimit(p.t, pid)
	for limit := 64 << 20; limit >= 1<<20; limit -= 1 << 20 { // cgroup v1 takes none that is less than what is in use
		if err := os.WriteFile(file, []byte(strconv.Itoa(limit)), 0); errors.Is(err, unix.EBUSY) {
			break
		} else if err != nil && unix.Kill(pid, 0) == nil {
			p.t.Fatal(err)
		}
	}
	testnet.Wait(p.t, "the kernel kills the sidecar", func() bool {
		p.run("", "curl", "-sS", "-o", "/dev/null", "--max-time", "1", "--parallel", "--parallel-max", "100", "http://"+p.ip4+":16020/metrics?[1-100]")
		return p.inspect("pillion").State.Status == "exited"
	})
}

// memoryLimit is the file by which the memory of a process's cgroup is limited, in either version of cgroups.
func memoryLimit(t *testing.T, pid int) string {
	t.Helper()
	of := func(hierarchy, cgroup, file string) string {
		return filepath.Join("/sys/fs/cgroup", hierarchy, cgroup, file)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	var limit string
	for line := range strings.Lines(string(b)) {
		switch fields := strings.SplitN(strings.TrimSpace(line), ":", 3); {
		case fields[1] == "memory":
			return of("memory", fields[2], "memory.limit_in_bytes")
		case fields[0] == "0":
			limit = of("", fields[2], "memory.max")
		}
	}
	return limit
}

// TestSigtermDuringTransfer: the sidecar that is told to stop carries on until the app's transfer is done.
func TestSigtermDuringTransfer(t *testing.T) {
	t.Parallel()
	client, web := pair(t)
	a := client.ask("app", "/usr/bin/curl", "-sS", "-o", "/dev/null", "-w", "%{size_download}\n", "http://"+web.ip4+"/million")
	testnet.Wait(t, "the transfer is under way", func() bool {
		return strings.Contains(client.must(client.run("", "curl", "-fsS", "http://"+client.ip4+":16020/metrics")), `pillion_connections_open{direction="outbound",protocol="tcp"} 1`)
	})
	client.must(client.podman("stop", "--time=60", client.container("pillion")))
	a.end(t, 0)
	if !strings.Contains(a.out.String(), "1000000") {
		t.Errorf("the transfer was cut: %s", a.out)
	}
	if i := client.waitStatus("pillion", "exited"); i.State.ExitCode != 0 {
		t.Errorf("the sidecar ended with %d:\n%s", i.State.ExitCode, client.logs("pillion"))
	}
}

// TestContainersThatComeLater: a container that is added to the running pod is captured too, as any user, and with
// every capability; so is an app after init has run a second time.
func TestContainersThatComeLater(t *testing.T) {
	t.Parallel()
	client, web := pair(t)
	captured := func(args ...string) {
		t.Helper()
		before := strings.Count(client.logs("pillion"), `"direction":"outbound"`)
		run := append([]string{"run", "--rm", "--pod=" + client.name}, args...)
		client.must(client.podman(append(run, shellImage, "/usr/bin/curl", "-sS", "--max-time", "20", "http://"+web.ip4)...))
		testnet.Wait(t, fmt.Sprintf("the sidecar carries the connection of %v", args), func() bool {
			return strings.Count(client.logs("pillion"), `"direction":"outbound"`) > before
		})
	}
	captured()
	captured("--privileged")
	captured("--user=65534", "--cap-drop=all")
	captured("--user=1666") // the sidecar's
	again := client.must(client.podman("run", "--rm", "--pod="+client.name, "--privileged", "--user=0", pillionImage, "init"))
	if !strings.Contains(again, "captured already") {
		t.Errorf("init, run again in the pod, says\n%s", again)
	}
	client.must(client.curl("http://" + web.ip4))
	captured()
}

// TestProbesOfTheNode: what the kubelet would ask of an app from the node's address is answered as without a sidecar; a port
// at which nobody listens refuses.
func TestProbesOfTheNode(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	web := n.start(2, "web", n.inject("web"))
	if got, want := n.must(n.run("", "curl", "-sS", "--max-time", "20", "http://"+web.ip4)), subnet4+"1 came to "+web.ip4+"\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if r := n.run("", "curl", "-sS", "--max-time", "20", "http://"+web.ip4+":81"); r.code != curlConnect {
		t.Errorf("a port at which nobody listens: exit code %d\n%s", r.code, r.out)
	}
	web.must(web.exec("app", "/usr/sbin/nginx", "-c", "/etc/nginx.conf", "-t"))
	web.must(web.podman("stop", web.container("app")))
	if r := n.run("", "curl", "-sS", "--max-time", "20", "http://"+web.ip4); r.code != curlConnect {
		t.Errorf("a dead app: exit code %d, want %d\n%s", r.code, curlConnect, r.out)
	}
}

// TestFailingInit: an init that cannot capture keeps the app from starting, and its last line says why.
func TestFailingInit(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	manifest := n.inject("client", variant("least")...)
	broken := strings.ReplaceAll(manifest, "- BPF #", "- CHOWN #")
	if broken == manifest {
		t.Fatalf("the manifest does not name the capability BPF:\n%s", manifest)
	}
	p, r := n.play(3, "client", broken)
	if r.code == 0 {
		t.Errorf("kube play went on")
	}
	if i := p.inspect("app"); i.State.Status == "running" || i.State.Pid != 0 {
		t.Errorf("the app is %s", i.State.Status)
	}
	if said := p.logs("pillion-init"); !strings.Contains(said, "CAP_BPF") {
		t.Errorf("init said\n%s", said)
	}
}

// TestJob: a pod whose app ends by itself: its exit code is the app's.
func TestJob(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	web := n.plain(2, "web")
	manifest := strings.Replace(n.read("client"), `"trap exit TERM; /bin/busybox sleep 1000 & wait"`, `"/usr/bin/curl -sS --max-time 60 http://`+web.ip4+` && exit 3"`, 1)
	p, r := n.play(3, "job", n.injectYAML(manifest))
	n.must(r)
	if i := p.waitStatus("app", "exited"); i.State.ExitCode != 3 {
		t.Errorf("the job ended with %d, want 3\n%s", i.State.ExitCode, p.logs("app"))
	}
	p.waitLog("pillion", `"destination":"`+web.ip4+`:80"`)
	p.must(p.podman("stop", "--time=20", p.container("pillion")))
	if i := p.waitStatus("pillion", "exited"); i.State.ExitCode != 0 {
		t.Errorf("the sidecar ended with %d", i.State.ExitCode)
	}
}

// TestTwoContainers: both containers of a pod are captured, whoever their user is and whatever they may do.
func TestTwoContainers(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	web := n.plain(2, "web")
	const other = "    - name: other\n" +
		"      securityContext: {runAsUser: 0, capabilities: {add: [NET_ADMIN, NET_RAW]}}\n"
	containers, app, found := strings.Cut(n.read("client"), "    - name: app\n")
	if !found {
		t.Fatalf("testdata/client.yaml has no container app")
	}
	client := n.start(3, "client", n.injectYAML(containers+"    - name: app\n"+app+other+app))
	for i, container := range []string{"app", "other"} {
		client.must(client.exec(container, "/usr/bin/curl", "-sS", "--max-time", "20", "http://"+web.ip4))
		testnet.Wait(t, "the sidecar carries the connection of "+container, func() bool {
			return strings.Count(client.logs("pillion"), `"direction":"outbound"`) == i+1
		})
	}
}
