// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	agentEnv   = "PILLION_TESTNET_AGENT" // set in the environment of an agent
	maxMessage = 128 << 10               // a request or a response, as JSON
)

// Agent is a process of its own inside a namespace and a cgroup: this test binary, run again. It makes the sockets that
// must belong to the captured cgroup and hands them over, or keeps them and does what an Op says.
type Agent struct {
	Cmd *Cmd

	t    testing.TB
	conn *net.UnixConn

	mu      sync.Mutex
	nextID  uint64
	waiting map[uint64]chan response
	gone    bool
}

// ErrAgentGone is what calls return whose agent has ended.
var ErrAgentGone = errors.New("the agent has ended")

type request struct {
	ID   uint64          `json:"id"`
	Op   string          `json:"op"`
	Args json.RawMessage `json:"args"`
}

type response struct {
	ID     uint64          `json:"id"`
	Result json.RawMessage `json:"result,omitempty"`
	Error  *RemoteError    `json:"error,omitempty"`
	Ahead  bool            `json:"ahead,omitempty"` // this message brings the file of the next one, and nothing else

	file *os.File
}

// RemoteError is an error of an operation in the agent. It unwraps to the errno, where it was one.
type RemoteError struct {
	Text  string        `json:"text"`
	Errno syscall.Errno `json:"errno,omitempty"`
}

func (e *RemoteError) Error() string { return e.Text }

func (e *RemoteError) Unwrap() error {
	if e.Errno == 0 {
		return nil
	}
	return e.Errno
}

// Agent starts an agent as root.
func (ns *Namespace) Agent(cg *Cgroup) *Agent {
	ns.t.Helper()
	return ns.AgentAs(cg, nil)
}

// AgentAs starts an agent as another user. The TestMain of the test must call AgentMain.
func (ns *Namespace) AgentAs(cg *Cgroup, user *User) *Agent {
	ns.t.Helper()
	cmd := ns.Command(cg, "/proc/self/exe")
	cmd.User = user
	return ns.AgentThrough(cmd)
}

// AgentThrough starts a command that runs this test binary in the end, and hands on to it its environment and its standard
// input, by which the agent is spoken to. Where the command's output is not set it is the test's.
func (ns *Namespace) AgentThrough(cmd *Cmd) *Agent {
	ns.t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		ns.t.Fatalf("testnet: agent: %v", err)
	}
	mine, theirs := os.NewFile(uintptr(pair[0]), "agent"), os.NewFile(uintptr(pair[1]), "agent")
	defer mine.Close()
	defer theirs.Close()
	conn, err := net.FileConn(mine)
	if err != nil {
		ns.t.Fatalf("testnet: agent: %v", err)
	}
	a := &Agent{Cmd: cmd, t: ns.t, conn: conn.(*net.UnixConn), waiting: make(map[uint64]chan response)}
	cmd.Env, cmd.Stdin = append(os.Environ(), agentEnv+"=1"), theirs
	if cmd.Stdout == nil {
		cmd.Stdout = os.Stdout
	}
	if cmd.Stderr == nil {
		cmd.Stderr = os.Stderr
	}
	if err := cmd.Start(); err != nil {
		conn.Close()
		ns.t.Fatalf("testnet: agent: %v", err)
	}
	read := make(chan struct{})
	go a.readLoop(read)
	ns.t.Cleanup(func() {
		a.conn.Close()
		<-read
	})
	return a
}

// Pid is the agent's process.
func (a *Agent) Pid() int { return a.Cmd.Process.Pid }

// Kill kills the agent with SIGKILL and waits for its end. The kernel closes its sockets as it does for any process.
func (a *Agent) Kill() { a.Cmd.Kill() }

// readLoop hands responses to their callers, until the agent has ended.
func (a *Agent) readLoop(done chan struct{}) {
	defer close(done)
	var ahead *os.File
	for {
		body, file, err := receive(a.conn)
		var r response
		if err == nil {
			err = json.Unmarshal(body, &r)
		}
		if err == nil && r.Ahead {
			ahead = file
			continue
		}
		a.mu.Lock()
		if err != nil {
			a.gone = true
			for id, ch := range a.waiting {
				delete(a.waiting, id)
				close(ch)
			}
			a.mu.Unlock()
			return
		}
		r.file, ahead = ahead, nil
		ch := a.waiting[r.ID]
		delete(a.waiting, r.ID)
		a.mu.Unlock()
		if ch != nil {
			ch <- r
		}
	}
}

// call sends one request and waits for its response.
func (a *Agent) call(op string, args any) (response, error) {
	raw, err := json.Marshal(args)
	if err != nil {
		return response{}, err
	}
	ch := make(chan response, 1)
	a.mu.Lock()
	if a.gone {
		a.mu.Unlock()
		return response{}, ErrAgentGone
	}
	a.nextID++
	id := a.nextID
	a.waiting[id] = ch
	a.mu.Unlock()

	body, err := json.Marshal(request{ID: id, Op: op, Args: raw})
	if err == nil {
		_, err = a.conn.Write(body)
	}
	if err != nil {
		a.mu.Lock()
		delete(a.waiting, id)
		a.mu.Unlock()
		return response{}, fmt.Errorf("%w: %w", ErrAgentGone, err)
	}
	r, ok := <-ch
	if !ok {
		return response{}, ErrAgentGone
	}
	if r.Error != nil {
		return r, r.Error
	}
	return r, nil
}

// receive reads one message and the file that may have come with it.
func receive(c *net.UnixConn) ([]byte, *os.File, error) {
	body, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4))
	n, oobn, flags, _, err := c.ReadMsgUnix(body, oob)
	if err != nil {
		return nil, nil, err
	}
	if n == 0 {
		return nil, nil, net.ErrClosed
	}
	if flags&unix.MSG_TRUNC != 0 {
		return nil, nil, fmt.Errorf("a message of more than %d bytes", maxMessage)
	}
	var file *os.File
	if oobn > 0 {
		msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil || len(msgs) != 1 {
			return nil, nil, fmt.Errorf("control message: %v", err)
		}
		fds, err := unix.ParseUnixRights(&msgs[0])
		if err != nil {
			return nil, nil, err
		}
		unix.CloseOnExec(fds[0])
		file = os.NewFile(uintptr(fds[0]), "from the agent")
	}
	return body[:n], file, nil
}
