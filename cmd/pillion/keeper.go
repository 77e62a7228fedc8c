// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/proxy/listen"
	"github.com/pillionproxy/pillion/redirect"
	"github.com/pillionproxy/pillion/redirect/rootless"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// The keeper is the first process of a command's namespaces: it captures them, opens sockets there for the proxy, which is
// outside, starts the command and waits for it. When it ends, the kernel ends every process of the command, and all that was
// made with them; and it ends when the proxy does.

// keeperVerb is the hidden verb of the keeper; its socket to the proxy is descriptor 3.
const (
	keeperVerb   = "keep"
	keeperSocket = 3
)

// keepRequest is what the proxy asks of the keeper. One of the fields is set.
type keepRequest struct {
	Capture *keepCapture `json:",omitempty"` // answered with the listeners
	Answer  *keepFlow    `json:",omitempty"` // answered with a socket
	Refuse  *keepFlow    `json:",omitempty"` // answered when the client was told
	Dial    *keepDial    `json:",omitempty"` // answered with a socket that connects
	Start   *keepStart   `json:",omitempty"` // answered when the command runs, and again when it has ended
}

// keepCapture is of what the plan is made.
type keepCapture struct {
	Host  rootless.Host
	Ports rootless.Ports
}

// keepFlow is whom the command sent datagrams, and from where.
type keepFlow struct {
	Meant, Client netip.AddrPort
	NoPort        bool // refused by the host; else the host is not reached
}

type keepStart struct {
	Path      string
	Args      []string
	Wait      bool // for what the command leaves in the background
	Listening bool // tell on what it listens
}

// keepReply is the answer. Descriptors come beside it.
type keepReply struct {
	TCP, UDP  int        // how many of the descriptors are listeners of each
	Listening []openPort // news: on what the command listens now
	Ended     bool       // news: the command has
	Status    int        // of the command, as a shell would show it
	Left      int        // processes of the command that were ended with it
	Err       string     `json:",omitempty"`
	Hint      string     `json:",omitempty"`
	Exit      int        `json:",omitempty"`
}

func failed(err error) keepReply {
	return keepReply{Err: err.Error(), Hint: config.HintOf(err), Exit: config.ExitOf(err)}
}

func (r keepReply) err() error {
	if r.Err == "" {
		return nil
	}
	return &config.Fault{Err: errors.New(r.Err), Hint: r.Hint, Exit: r.Exit}
}

// newKeepCommand is the keeper.
func newKeepCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:    keeperVerb,
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			unix.CloseOnExec(keeperSocket)
			conn, err := net.FileConn(os.NewFile(keeperSocket, "proxy"))
			if err == nil && os.Getpid() != 1 {
				err = errors.New("not the first process of a namespace") // it would end every process of this user
			}
			if err != nil {
				return &config.Fault{Err: fmt.Errorf("the keeper of a command: %w", err), Hint: "`pillion run` starts it", Exit: config.ExitUsage}
			}
			k := &keeper{e: e, line: &line{conn.(*net.UnixConn)}}
			return k.serve(cmd.Context())
		},
	}
}

type keeper struct {
	e    *env
	line *line
}

// serve does what the proxy asks until the command has ended, or the proxy has.
func (k *keeper) serve(ctx context.Context) error {
	// Programs that the command starts look into /proc for themselves. Where a container hides parts of it none can be made, and
	// they see the host's.
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err == nil {
		_ = unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	}
	for {
		var r keepRequest
		if _, err := k.line.receive(&r); err != nil {
			if errors.Is(err, io.EOF) {
				return nil // and every process of the command with us
			}
			return err
		}
		var reply keepReply
		var files []*os.File
		if r.Start != nil {
			err := k.start(*r.Start)
			if err == nil {
				continue // it was answered
			}
			reply = failed(err)
		} else {
			reply, files = k.do(ctx, r)
		}
		err := k.line.send(reply, files)
		for _, f := range files {
			_ = f.Close()
		}
		if err != nil {
			return err
		}
	}
}

func (k *keeper) do(ctx context.Context, r keepRequest) (keepReply, []*os.File) {
	switch {
	case r.Capture != nil:
		return k.capture(ctx, rootless.MakePlan(r.Capture.Host, r.Capture.Ports))
	case r.Answer != nil:
		f, err := r.Answer.open(ctx)
		if err != nil {
			return failed(err), nil
		}
		return keepReply{}, []*os.File{f}
	case r.Refuse != nil:
		if err := r.Refuse.refuse(); err != nil {
			return failed(err), nil
		}
		return keepReply{}, nil
	case r.Dial != nil:
		f, err := r.Dial.open()
		if err != nil {
			return failed(err), nil
		}
		return keepReply{}, []*os.File{f}
	}
	return failed(errors.New("the keeper was asked for nothing")), nil
}

// capture installs the plan and opens the listeners that it leads to.
func (k *keeper) capture(ctx context.Context, p rootless.Plan) (keepReply, []*os.File) {
	if err := p.Install(); err != nil {
		return failed(err), nil
	}
	l, err := listen.Open(listen.Kind{Transparent: true}, p.Ports.TCP, nil)
	if err != nil {
		return failed(err), nil
	}
	defer l.Close()
	files, err := l.Files()
	reply := keepReply{TCP: len(files)}
	if err == nil {
		err = p.Prove(ctx, files)
	}
	if err != nil {
		return failed(err), files
	}
	for _, addr := range []string{"127.0.0.1", "::1"}[:len(files)] {
		f, err := listenUDP(ctx, netip.AddrPortFrom(netip.MustParseAddr(addr), p.Ports.UDP))
		if err != nil {
			return failed(err), files
		}
		files = append(files, f)
		reply.UDP++
	}
	return reply, files
}

// start starts the command, without any capability, says so, and waits for it in the background: the answer must go before the
// news of its end, and we end with that.
func (k *keeper) start(s keepStart) error {
	// What is inheritable or ambient would be the command's too.
	caps := cap.GetProc()
	if err := errors.Join(cap.ResetAmbient(), caps.ClearFlag(cap.Inheritable), caps.SetProc()); err != nil {
		return fmt.Errorf("give up capabilities for the command: %w", err)
	}
	cmd := &exec.Cmd{Path: s.Path, Args: s.Args, Stdin: k.e.stdin, Stdout: k.e.stdout, Stderr: k.e.stderr}
	signals := catchSignals()
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // the death of the starting thread would be that of the command
		err := cmd.Start()
		if err != nil {
			signals.stop()
			started <- err
			return
		}
		_ = k.line.send(keepReply{}, nil) // the proxy is gone else
		started <- nil
		if s.Listening {
			go k.tellListening()
		}
		signals.passTo(cmd.Process)
		status := reap(cmd.Process.Pid)
		signals.stop()
		left := endOthers(s.Wait)
		_ = k.line.send(keepReply{Ended: true, Status: status, Left: left}, nil) // the proxy is gone else
		os.Exit(0)
	}()
	if err := <-started; err != nil {
		return &config.Fault{Err: fmt.Errorf("start %s: %w", s.Path, err), Exit: exitNotExecutable}
	}
	return nil
}

// lookForListeners is how often it is looked for new listeners: of these the kernel does not tell.
const lookForListeners = 100 * time.Millisecond

// tellListening tells the proxy on what the command listens, whenever that changes, until we end.
func (k *keeper) tellListening() {
	var told []openPort
	for ; ; time.Sleep(lookForListeners) {
		now := openPorts(redirect.ListeningSockets(), rootlessPorts.TCP)
		if slices.Equal(now, told) {
			continue
		}
		news := append([]openPort{}, now...) // none is news, too, but no news is nil
		if err := k.line.send(keepReply{Listening: news}, nil); err != nil {
			return // the proxy is gone
		}
		told = now
	}
}

// reap waits for the command; whatever else ends is forgotten. We are the first process of the namespace: who loses its
// parent becomes our child.
func reap(command int) (status int) {
	for {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return exitNotExecutable // there is no child at all: cannot be
		case pid == command && ws.Signaled():
			return exitSignalled + int(ws.Signal())
		case pid == command && ws.Exited():
			return ws.ExitStatus()
		}
	}
}

// endOthers waits for the processes that the command left, or ends them, and returns how many it ended. Those that do not heed
// SIGTERM are killed by the kernel, when we end.
func endOthers(wait bool) (left int) {
	pids := processes()
	if len(pids) == 0 {
		return 0
	}
	if wait {
		for {
			if _, err := unix.Wait4(-1, nil, 0, nil); errors.Is(err, unix.ECHILD) {
				return 0
			}
		}
	}
	unix.Kill(-1, unix.SIGTERM)
	unix.Kill(-1, unix.SIGCONT)
	for end := time.Now().Add(graceAfterCommand); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if _, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); errors.Is(err, unix.ECHILD) {
			break
		}
	}
	return len(pids)
}

// processes are those of this namespace beside us that have not ended.
func processes() []int {
	for {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		if errors.Is(err, unix.ECHILD) {
			return nil
		}
		if pid == 0 || err != nil && !errors.Is(err, unix.EINTR) {
			break
		}
	}
	own, err := os.Readlink("/proc/self")
	entries, rerr := os.ReadDir("/proc")
	if err != nil || rerr != nil || own != strconv.Itoa(os.Getpid()) {
		return []int{0} // /proc is another namespace's: there is one at least
	}
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && pid != os.Getpid() {
			pids = append(pids, pid)
		}
	}
	return pids
}
