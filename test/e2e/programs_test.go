// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillionproxy/pillion/test/testnet"
)

// host is where a program runs: a namespace, and a cgroup if it is captured.
type host struct {
	ns *testnet.Namespace
	cg *testnet.Cgroup
	by func(name string, args ...string) *testnet.Cmd // how clients are started; nil: as they are
}

// program prepares a client.
func (h host) program(name string, args ...string) *testnet.Cmd {
	if h.by != nil {
		return h.by(name, args...)
	}
	return h.ns.Command(h.cg, name, args...)
}

// programs are servers and their clients, by both their names.
var programs = map[string]func(*testing.T) service{
	"curl and nginx": nginx, "psql and PostgreSQL": postgres, "redis-cli and redis-server": redis, "ssh and sshd": ssh,
	"openssl s_client and s_server": openssl,
}

// serveOn starts a server and waits until it listens in both families.
func (s service) serveOn(t *testing.T, name string, h host, dir string) {
	t.Helper()
	s.start(t, h, dir)
	for _, v6 := range []bool{false, true} {
		h.ns.WaitSocket(t, name+" listens in either family", func(x testnet.Socket) bool {
			return x.State == testnet.Listen && x.Local.Port() == s.port && x.Local.Addr().Is6() == v6
		})
	}
}

// service is a server that we did not write.
type service struct {
	port uint16
	// resets says that a side may close with the other's farewell (RFC 8446 §6.1) unread, which is a reset.
	resets bool
	// start starts the server on every address of the host and returns when it has been started; dir is its own.
	start func(t *testing.T, h host, dir string)
	// use runs its client, wants the right answer, and returns no less than how many bytes went each way.
	use func(t *testing.T, h host, dir, address string) (sent, received int64)
}

// TestRealPrograms: programs that know nothing of us work unchanged, through the sidecar, in both directions.
func TestRealPrograms(t *testing.T) {
	t.Parallel()
	for name, program := range programs {
		t.Run(name, func(t *testing.T) {
			s := program(t)
			p := newCaptured(t, inside)
			dir := programDir(t)
			world, app := host{ns: p.ext}, host{ns: p.ns, cg: p.appCG}
			s.serveOn(t, name, world, dir)
			s.serveOn(t, name, app, programDir(t))
			for _, tt := range []struct {
				client   host
				from, to string
				inbound  bool
			}{
				{app, pod4, server4, false},
				{app, pod6, server6, false},
				{world, client4, pod4, true},
				{world, client6, pod6, true},
			} {
				direction := map[bool]string{false: "outbound", true: "inbound"}[tt.inbound]
				t.Run(fmt.Sprintf("%s to %s", direction, tt.to), func(t *testing.T) {
					before := len(p.proxy.records())
					sent, received := s.use(t, tt.client, dir, tt.to)
					to := netip.AddrPortFrom(netip.MustParseAddr(tt.to), s.port)
					var got record
					testnet.Wait(t, "the access log tells of it", func() bool {
						for _, r := range p.proxy.records()[before:] {
							if r.Destination == to {
								got = r
								return true
							}
						}
						return false
					})
					if got.Direction != direction || got.Source.Addr().String() != tt.from || got.Sent < sent || got.Received < received {
						t.Errorf("record %+v, want %s from %s with at least %d and %d bytes", got, direction, tt.from, sent, received)
					}
					t.Logf("%+v", got)
				})
			}
		})
	}
}

// nobody is the ordinary user whom every host knows by name, as some programs want.
var nobody = &testnet.User{UID: 65534, GID: 65534}

// TestRealProgramsRootless: the clients, run by `pillion run` without any right; the report tells what went each way.
func TestRealProgramsRootless(t *testing.T) {
	t.Parallel()
	all := maps.Clone(programs)
	maps.Copy(all, languages)
	for name, program := range all {
		t.Run(name, func(t *testing.T) {
			s := program(t)
			session := newSession(t)
			session.user = nobody
			dir, file := programDir(t), filepath.Join(session.folder(t), "report")
			s.serveOn(t, name, host{ns: session.ext}, dir)
			app := host{ns: session.ns, by: func(name string, args ...string) *testnet.Cmd {
				return session.raw([]string{"--report=json", "--report-file=" + file}, append([]string{name}, args...)...)
			}}
			for _, path := range session.outs()[:2] {
				t.Run(path.name, func(t *testing.T) {
					sent, received := s.use(t, app, dir, path.to.String())
					b, err := os.ReadFile(file) // of the last client
					var got struct{ Connections []record }
					if err == nil {
						err = json.Unmarshal(b, &got)
					}
					if err != nil || len(got.Connections) == 0 {
						t.Fatalf("the report tells of no connection: %v\n%s", err, b)
					}
					c := got.Connections[0]
					if c.Source.Addr() != path.from || c.Destination != netip.AddrPortFrom(path.to, s.port) || c.Reason != "ok" && !(s.resets && strings.HasSuffix(c.Reason, "_reset")) || c.Sent < sent || c.Received < received {
						t.Errorf("%+v, want from %s to port %d of %s, with at least %d and %d bytes", c, path.from, s.port, path.to, sent, received)
					}
				})
			}
		})
	}
}

// programDir is a directory that every user can reach and write to.
func programDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "plt-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return dir
}

func writeFile(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// serve starts a server; what it printed is shown when the test fails.
func (h host) serve(t *testing.T, user *testnet.User, name string, args ...string) {
	t.Helper()
	cmd := h.ns.Command(h.cg, name, args...)
	cmd.User = user
	out := &testnet.Lines{}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s said:\n%s", filepath.Base(name), tail(out.String(), 2000))
		}
		cmd.Kill()
	})
}

// client runs a client to its end and wants all of the given texts in its output.
func (h host) client(t *testing.T, wants []string, name string, args ...string) {
	t.Helper()
	r := run(t, h.program(name, args...))
	for _, want := range wants {
		if r.code != 0 || !strings.Contains(r.stdout, want) {
			t.Fatalf("%s %q: exit code %d, want 0 and %q in its output\n%s%s", name, args, r.code, want, tail(r.stdout, 1000), r.stderr)
		}
	}
}

const pageSize = 3 << 20

func nginx(t *testing.T) service {
	server, curl := testnet.NeedProgram(t, "nginx", "nginx-light"), testnet.NeedProgram(t, "curl", "curl")
	return service{
		port: 8080,
		start: func(t *testing.T, h host, dir string) {
			writeFile(t, dir+"/page", strings.Repeat("0123456789abcdef", pageSize/16))
			writeFile(t, dir+"/nginx.conf", `
daemon off; master_process off; pid `+dir+`/pid; error_log stderr;
events { worker_connections 64; }
http {
	access_log off; client_body_temp_path `+dir+`; proxy_temp_path `+dir+`; fastcgi_temp_path `+dir+`;
	uwsgi_temp_path `+dir+`; scgi_temp_path `+dir+`;
	server {
		listen 0.0.0.0:8080; listen [::]:8080;
		location /who { return 200 "$remote_addr asks $server_addr:$server_port\n"; }
		location / { root `+dir+`; }
	}
}`)
			h.serve(t, nil, server, "-p", dir, "-c", dir+"/nginx.conf", "-e", "stderr")
		},
		use: func(t *testing.T, h host, _, address string) (int64, int64) {
			url := "http://" + net.JoinHostPort(address, "8080")
			me := map[string]string{server4: pod4, server6: pod6, pod4: client4, pod6: client6}[address]
			// What nginx sees is the truth: who asks, and whom.
			h.client(t, []string{me + " asks " + address + ":8080"}, curl, "-sS", "--noproxy", "*", url+"/who", "-o", "-", url+"/page", "-o", "/dev/null", "-w", "%{http_code}\n")
			return 100, pageSize
		},
	}
}

func redis(t *testing.T) service {
	server, cli := testnet.NeedProgram(t, "redis-server", "redis-server"), testnet.NeedProgram(t, "redis-cli", "redis-tools")
	return service{
		port: 6379,
		start: func(t *testing.T, h host, dir string) {
			h.serve(t, nil, server, "--port", "6379", "--bind", "0.0.0.0", "::", "--protected-mode", "no", "--save", "", "--dir", dir)
		},
		use: func(t *testing.T, h host, _, address string) (int64, int64) {
			h.client(t, []string{"PONG"}, cli, "-h", address, "ping")
			h.client(t, []string{"100000"}, cli, "-h", address, "eval", `return string.len(string.rep("x", 100000))`, "0")
			return 10, 5
		},
	}
}

func postgres(t *testing.T) service {
	server, initdb, psql := testnet.NeedProgram(t, "postgres", "postgresql"), testnet.NeedProgram(t, "initdb", "postgresql"), testnet.NeedProgram(t, "psql", "postgresql-client")
	return service{
		port: 5432,
		start: func(t *testing.T, h host, dir string) {
			data := dir + "/data"
			make := h.ns.Command(nil, initdb, "-D", data, "-U", "postgres", "--auth", "trust", "--no-sync", "--no-instructions", "--locale", "C")
			make.User, make.Dir = nobody, dir // it refuses to run as root
			must(t, "initdb", run(t, make))
			hba, err := os.OpenFile(data+"/pg_hba.conf", os.O_APPEND|os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := hba.WriteString("host all all 0.0.0.0/0 trust\nhost all all ::/0 trust\n"); err != nil {
				t.Fatal(err)
			}
			hba.Close()
			h.serve(t, nobody, server, "-D", data, "-k", dir, "-c", "listen_addresses=*", "-c", "fsync=off", "-c", "shared_buffers=1MB")
		},
		use: func(t *testing.T, h host, _, address string) (int64, int64) {
			me := map[string]string{server4: pod4, server6: pod6, pod4: client4, pod6: client6}[address]
			// A server that listens may not be ready yet: it then says so, and psql fails.
			testnet.Wait(t, "PostgreSQL answers", func() bool {
				return run(t, h.program(psql, "-h", address, "-U", "postgres", "-c", "select 1")).code == 0
			})
			h.client(t, []string{me + "|" + address + "|5432|200000"}, psql, "-h", address, "-U", "postgres", "-At", "-c",
				"select host(inet_client_addr()), host(inet_server_addr()), inet_server_port(), length(repeat('x', 200000))")
			return 50, 50
		},
	}
}

func ssh(t *testing.T) service {
	server, client, keygen := testnet.NeedProgram(t, "sshd", "openssh-server"), testnet.NeedProgram(t, "ssh", "openssh-client"), testnet.NeedProgram(t, "ssh-keygen", "openssh-client")
	keys := programDir(t) // of both hosts, and of the client
	for _, key := range []string{"host", "user"} {
		must(t, "ssh-keygen", run(t, testnet.New(t).Command(keygen, "-q", "-t", "ed25519", "-N", "", "-f", keys+"/"+key)))
	}
	if err := os.Chown(keys+"/user", int(nobody.UID), int(nobody.GID)); err != nil { // root may read it, and is not asked why others may
		t.Fatal(err)
	}
	return service{
		port: 2222,
		start: func(t *testing.T, h host, dir string) {
			writeFile(t, dir+"/sshd_config", `
Port 2222
HostKey `+keys+`/host
AuthorizedKeysFile `+keys+`/user.pub
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
UsePAM yes
PidFile none
UseDNS no
`)
			// It wants a directory whose name is compiled in: here is one of its own.
			h.serve(t, nil, "unshare", "--mount", "sh", "-c", `mount -t tmpfs run /run && mkdir -m 755 /run/sshd && exec "$0" "$@"`,
				server, "-D", "-e", "-f", dir+"/sshd_config")
		},
		use: func(t *testing.T, h host, _, address string) (int64, int64) {
			me := map[string]string{server4: pod4, server6: pod6, pod4: client4, pod6: client6}[address]
			h.client(t, []string{me + " ", " " + address + " 2222", "1000000"}, client, "-p", "2222", "-F", "none", "-i", keys+"/user",
				"-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR",
				"root@"+address, `echo "$SSH_CONNECTION"; head -c 1000000 /dev/zero | wc -c`)
			return 1000, 1000
		},
	}
}

func openssl(t *testing.T) service {
	program := testnet.NeedProgram(t, "openssl", "openssl")
	return service{
		port: 4433,
		start: func(t *testing.T, h host, dir string) {
			must(t, "openssl req", run(t, h.ns.Command(nil, program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
				"-nodes", "-subj", "/CN=pillion", "-keyout", dir+"/key", "-out", dir+"/cert")))
			for _, accept := range [][2]string{{"-4", "0.0.0.0:4433"}, {"-6", "[::]:4433"}} { // one server takes one family
				h.serve(t, nil, program, "s_server", accept[0], "-accept", accept[1], "-key", dir+"/key", "-cert", dir+"/cert", "-www")
			}
		},
		use: func(t *testing.T, h host, dir, address string) (int64, int64) {
			cmd := h.program(program, "s_client", "-connect", net.JoinHostPort(address, "4433"), "-servername", "pillion", "-ign_eof")
			cmd.Stdin = strings.NewReader("GET / HTTP/1.0\r\n\r\n")
			r := run(t, cmd)
			for _, want := range []string{"subject=CN", "TLSv1.3", "s_server -"} {
				if r.code != 0 || !strings.Contains(r.stdout, want) {
					t.Fatalf("s_client: exit code %d, want 0 and %q\n%s%s", r.code, want, r.stdout, r.stderr)
				}
			}
			return 300, 1000
		},
	}
}
