// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"archive/zip"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pillionproxy/pillion/test/testnet"
)

// languages are clients written in languages whose runtimes meet the network each in its own way, of one server for the Web.
var languages = map[string]func(*testing.T) service{
	"Git over HTTPS": web(tlsPort, git), "Go modules": web(httpPort, goModules), "Java over TLS": web(tlsPort, java),
	"Node over HTTPS": web(tlsPort, node), "Python over HTTPS": web(tlsPort, python),
}

// The ports of the server.
const tlsPort, httpPort = 8443, 8080

// webClient prepares what its server offers from below dir, and returns how it is used.
type webClient func(t *testing.T, dir string) func(t *testing.T, h host, dir, address string)

// web is nginx with a certificate of its own, and a client that connects to the port.
func web(port uint16, client webClient) func(*testing.T) service {
	return func(t *testing.T) service {
		server, tool := testnet.NeedProgram(t, "nginx", "nginx-light"), testnet.NeedProgram(t, "openssl", "openssl")
		offered := programDir(t)
		use := client(t, offered)
		return service{
			port:   port,
			resets: port == tlsPort,
			start: func(t *testing.T, h host, dir string) {
				must(t, "openssl req", run(t, h.ns.Command(nil, tool, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
					"-nodes", "-subj", "/CN=pillion", "-keyout", dir+"/key", "-out", dir+"/cert")))
				writeFile(t, dir+"/nginx.conf", fmt.Sprintf(`
daemon off; master_process off; pid %[1]s/pid; error_log stderr;
events { worker_connections 256; }
http {
	access_log off; client_body_temp_path %[1]s; proxy_temp_path %[1]s; fastcgi_temp_path %[1]s; uwsgi_temp_path %[1]s; scgi_temp_path %[1]s;
	server {
		listen 0.0.0.0:%[2]d ssl; listen [::]:%[2]d ssl; listen 0.0.0.0:%[3]d; listen [::]:%[3]d;
		ssl_certificate %[1]s/cert; ssl_certificate_key %[1]s/key;
		location /who { return 200 "$remote_addr asks $server_addr\n"; }
		location / { root %[4]s; }
	}
}`, dir, tlsPort, httpPort, offered))
				h.serve(t, nil, server, "-p", dir, "-c", dir+"/nginx.conf", "-e", "stderr")
			},
			use: func(t *testing.T, h host, dir, address string) (int64, int64) {
				use(t, h, dir, address)
				return 50, 50
			},
		}
	}
}

func https(address string) string { return "https://" + net.JoinHostPort(address, fmt.Sprint(tlsPort)) }

// asks is what the server says of who asks it.
func asks(address string) string {
	return map[string]string{server4: pod4, server6: pod6}[address] + " asks " + address
}

func git(t *testing.T, offered string) func(*testing.T, host, string, string) {
	program := testnet.NeedProgram(t, "git", "git")
	// A repository for servers that know nothing of Git: each of its files is a request.
	for _, args := range [][]string{
		{"init", "-q", "work"},
		{"-C", "work", "-c", "user.name=A", "-c", "user.email=a@example.com", "commit", "-q", "--allow-empty", "-m", "the only one"},
		{"clone", "-q", "--bare", "work", "repository"},
		{"-C", "repository", "update-server-info"},
	} {
		cmd := testnet.New(t).Command(program, args...)
		cmd.Dir = offered
		must(t, "git", run(t, cmd))
	}
	return func(t *testing.T, h host, _, address string) {
		copied := filepath.Join(programDir(t), "copy")
		must(t, "git clone", run(t, h.program("env", "HOME=/nonexistent", program, "-c", "http.sslVerify=false", "clone", "-q", https(address)+"/repository", copied)))
		if r := run(t, h.ns.Command(nil, program, "-c", "safe.directory=*", "-C", copied, "log", "--format=%s")); r.stdout != "the only one\n" {
			t.Errorf("the copy is of %q\n%s", r.stdout, r.stderr)
		}
	}
}

func goModules(t *testing.T, offered string) func(*testing.T, host, string, string) {
	program := testnet.NeedProgram(t, "go", "golang")
	const modules = 20
	var wanted []string
	for i := range modules { // as the module proxy of `go help goproxy` offers them
		module := fmt.Sprintf("example.com/m%d", i)
		dir := filepath.Join(offered, module, "@v")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		writeFile(t, dir+"/v1.0.0.info", `{"Version":"v1.0.0"}`)
		writeFile(t, dir+"/v1.0.0.mod", "module "+module+"\n")
		f, err := os.Create(dir + "/v1.0.0.zip")
		if err != nil {
			t.Fatal(err)
		}
		z := zip.NewWriter(f)
		w, err := z.Create(module + "@v1.0.0/go.mod")
		if err == nil {
			_, err = w.Write([]byte("module " + module + "\n"))
		}
		if err != nil || z.Close() != nil || f.Close() != nil {
			t.Fatal("cannot write a module", err)
		}
		wanted = append(wanted, module+"@v1.0.0")
	}
	return func(t *testing.T, h host, _, address string) {
		cache := programDir(t)
		proxy := "http://" + net.JoinHostPort(address, fmt.Sprint(httpPort))
		// Nothing of the host's: its cache, its settings, or a module that it works in.
		h.client(t, []string{fmt.Sprintf("m%d@v1.0.0", modules-1)}, "env", append([]string{
			"-C", cache, "-u", "GOFLAGS", "HOME=" + cache, "GOPATH=" + cache, "GOENV=off", "GOTOOLCHAIN=local",
			"GOPROXY=" + proxy, "GONOSUMDB=*", "GOINSECURE=*", program, "mod", "download", "-json", "-modcacherw",
		}, wanted...)...)
	}
}

func java(t *testing.T, _ string) func(*testing.T, host, string, string) {
	program := testnet.NeedProgram(t, "keytool", "default-jre-headless")
	return func(t *testing.T, h host, _, address string) {
		h.client(t, []string{"Owner: CN=pillion"}, program, "-printcert", "-sslserver", net.JoinHostPort(address, fmt.Sprint(tlsPort)))
	}
}

func node(t *testing.T, _ string) func(*testing.T, host, string, string) {
	program := testnet.NeedProgram(t, "node", "nodejs")
	return func(t *testing.T, h host, _, address string) {
		h.client(t, []string{strings.Repeat(asks(address)+"\n", 50)}, program, "-e", `
for (let i = 0; i < 50; i++)
	require("https").get(process.argv[1], {rejectUnauthorized: false, agent: false}, (answer) => answer.pipe(process.stdout))
`, https(address)+"/who")
	}
}

func python(t *testing.T, _ string) func(*testing.T, host, string, string) {
	program := testnet.NeedProgram(t, "python3", "python3")
	return func(t *testing.T, h host, _, address string) {
		h.client(t, []string{strings.Repeat(asks(address)+"\n", 50)}, program, "-c", `
import concurrent.futures, ssl, sys, urllib.request
trusting = ssl._create_unverified_context()
ask = lambda _: urllib.request.urlopen(sys.argv[1], context=trusting).read().decode()
with concurrent.futures.ThreadPoolExecutor(10) as pool:
	print("".join(pool.map(ask, range(50))))
`, https(address)+"/who")
	}
}
