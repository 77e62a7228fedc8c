// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"

	"github.com/pillionproxy/pillion/proxy/listen"
	"github.com/pillionproxy/pillion/redirect/rootless"
	"golang.org/x/sys/unix"
)

// kept is the keeper as the proxy sees it.
type kept struct {
	cmd     *exec.Cmd
	line    *line
	ended   chan struct{} // closed when the process is no more
	asking  sync.Mutex    // one question at a time
	answers chan answer
	news    chan []openPort // on what the command listens now
	over    chan keepReply  // the command has ended
	gone    chan struct{}   // closed when the keeper says nothing more
}

type answer struct {
	keepReply
	files []*os.File
}

// keep starts a keeper in namespaces of its own, as this user, or as root of these namespaces.
func keep(e *env, asRoot bool) (*kept, error) {
	ours, theirs, err := newLine()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	uid, gid := os.Geteuid(), os.Getegid()
	inside := func(id int) int {
		if asRoot {
			return 0
		}
		return id
	}
	cmd := &exec.Cmd{
		Path: "/proc/self/exe", Args: []string{"pillion", keeperVerb},
		Stdin: e.stdin, Stdout: e.stdout, Stderr: e.stderr, ExtraFiles: []*os.File{theirs},
		SysProcAttr: &syscall.SysProcAttr{
			Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWNS,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: inside(uid), HostID: uid, Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: inside(gid), HostID: gid, Size: 1}},
			// Rights over these namespaces alone. Without root's user id they would be lost with exec.
			AmbientCaps: []uintptr{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW, unix.CAP_SYS_ADMIN, unix.CAP_NET_BIND_SERVICE},
			Pdeathsig:   syscall.SIGKILL, // the keeper notices by itself, too, when its line ends
		},
	}
	k := &kept{cmd: cmd, line: ours, ended: make(chan struct{}), answers: make(chan answer), news: make(chan []openPort), over: make(chan keepReply, 1), gone: make(chan struct{})}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // Pdeathsig is of this thread
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // what it has to say it says by the line
			close(k.ended)
		}
	}()
	if err := <-started; err != nil {
		_ = ours.Close()
		return nil, rootless.Explain(err)
	}
	go k.listen()
	return k, nil
}

// listen sorts what the keeper says, until its line ends.
func (k *kept) listen() {
	defer close(k.gone)
	for {
		var r keepReply
		files, err := k.line.receive(&r)
		if err != nil {
			return
		}
		switch {
		case r.Ended:
			k.over <- r
		case r.Listening != nil:
			select {
			case k.news <- r.Listening:
			case <-k.ended:
			}
		default:
			select {
			case k.answers <- answer{r, files}:
			case <-k.ended:
				closeAll(files)
			}
		}
	}
}

var errKeeperGone = errors.New("the process that keeps the command's namespaces has ended")

// ask asks one question. The files are the caller's.
func (k *kept) ask(r keepRequest) (answer, error) {
	k.asking.Lock()
	defer k.asking.Unlock()
	if err := k.line.send(r, nil); err != nil {
		return answer{}, err
	}
	var a answer
	select {
	case a = <-k.answers:
	case <-k.gone:
		return answer{}, errKeeperGone
	}
	if err := a.err(); err != nil {
		closeAll(a.files)
		return answer{}, err
	}
	return a, nil
}

// askSocket asks for one socket. It is the caller's.
func (k *kept) askSocket(r keepRequest) (*os.File, error) {
	a, err := k.ask(r)
	if err != nil {
		return nil, err
	}
	if len(a.files) != 1 {
		closeAll(a.files)
		return nil, fmt.Errorf("the keeper sent %d sockets, not one", len(a.files))
	}
	return a.files[0], nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// capture captures the namespace and returns its listeners.
func (k *kept) capture(host rootless.Host) (tcp *listen.Listener, datagrams []*os.File, err error) {
	a, err := k.ask(keepRequest{Capture: &keepCapture{host, rootlessPorts}})
	if err != nil {
		return nil, nil, err
	}
	if len(a.files) != a.TCP+a.UDP {
		closeAll(a.files)
		return nil, nil, fmt.Errorf("the keeper sent %d listeners, not %d", len(a.files), a.TCP+a.UDP)
	}
	tcp, err = listen.Adopt(listen.Kind{Transparent: true}, a.files[:a.TCP])
	if err != nil {
		closeAll(a.files[a.TCP:])
	}
	return tcp, a.files[a.TCP:], err
}

// Answer and Refuse make it an udp.Side.
func (k *kept) Answer(meant, client netip.AddrPort) (*net.UDPConn, error) {
	f, err := k.askSocket(keepRequest{Answer: &keepFlow{Meant: meant, Client: client}})
	if err != nil {
		return nil, err
	}
	defer f.Close()
	conn, err := net.FilePacketConn(f)
	if err != nil {
		return nil, err
	}
	return conn.(*net.UDPConn), nil
}

func (k *kept) Refuse(meant, client netip.AddrPort, why unix.Errno) {
	_, _ = k.ask(keepRequest{Refuse: &keepFlow{meant, client, why == unix.ECONNREFUSED}}) // else the client times out
}

// run starts the command and waits for its end. Meanwhile listening is told on what it listens, if s says so.
func (k *kept) run(s keepStart, listening func([]openPort)) (status, left int, err error) {
	signals := catchSignals()
	defer signals.stop()
	if _, err := k.ask(keepRequest{Start: &s}); err != nil {
		return 0, 0, err
	}
	signals.passTo(k.cmd.Process)
	for running := true; running; {
		select {
		case ports := <-k.news:
			listening(ports)
		case <-k.gone:
			running = false
		}
	}
	select {
	case r := <-k.over:
		return r.Status, r.Left, nil
	default:
		return 0, 0, errKeeperGone
	}
}

// close ends the keeper, and with it whatever is left of the command.
func (k *kept) close() {
	_ = k.line.Close()
	_ = k.cmd.Process.Kill()
	<-k.ended
}
