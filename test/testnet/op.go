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

// Op is an operation that an agent can do: the test calls it with an A, the function runs in the agent's process, and
// the R comes back. Arguments and results travel as JSON, at most 128 KiB of it.
type Op[A, R any] struct {
	name string
	run  func(A) (R, error)
}

// NewOp makes an operation. It must be given to AgentMain.
func NewOp[A, R any](name string, run func(A) (R, error)) Op[A, R] { return Op[A, R]{name, run} }

// Call runs the operation in the agent and waits for the result. Several calls may run at once. An error is a
// *RemoteError, or ErrAgentGone.
func (o Op[A, R]) Call(a *Agent, args A) (result R, err error) {
	r, err := a.call(o.name, args)
	if err != nil {
		return result, err
	}
	return result, json.Unmarshal(r.Result, &result)
}

func (o Op[A, R]) opName() string { return o.name }

func (o Op[A, R]) serve(raw json.RawMessage) (any, *os.File, error) {
	var args A
	if err := json.Unmarshal(raw, &args); err != nil {
		return nil, nil, err
	}
	result, err := o.run(args)
	return result, nil, err
}

// Operation is any Op.
type Operation interface {
	opName() string
	serve(json.RawMessage) (result any, file *os.File, err error)
}

// fileOp is an operation whose result is an open file as well.
type fileOp[A, R any] struct {
	name string
	run  func(A) (R, *os.File, error)
}

func (o fileOp[A, R]) opName() string { return o.name }

func (o fileOp[A, R]) serve(raw json.RawMessage) (any, *os.File, error) {
	var args A
	if err := json.Unmarshal(raw, &args); err != nil {
		return nil, nil, err
	}
	return o.run(args)
}

// AgentMain does what agents do, and does not return, when this process is one; else it returns at once. A TestMain begins
// with it.
func AgentMain(ops ...Operation) {
	if os.Getenv(agentEnv) == "" {
		return
	}
	os.Unsetenv(agentEnv)
	if err := agentMain(ops); err != nil {
		fmt.Fprintf(os.Stderr, "agent %d: %v\n", os.Getpid(), err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Main runs the tests and returns the exit status, which tells as well when they left a namespace or a cgroup behind.
func Main(m *testing.M) int {
	status := m.Run()
	if left := Left(); len(left) > 0 {
		fmt.Fprintf(os.Stderr, "testnet: the tests left behind %v\n", left)
		status = max(status, 1)
	}
	return status
}

// agentMain serves requests until the test closes its end, which it does at its own end, whatever that is.
func agentMain(ops []Operation) error {
	f := os.NewFile(0, "test")
	conn, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return err
	}
	if _, err := unix.Open(os.DevNull, unix.O_RDWR, 0); err != nil { // in its place: standard input again
		return err
	}
	byName := make(map[string]Operation)
	for _, op := range append([]Operation{dialOp, listenOp, socketOp}, ops...) {
		byName[op.opName()] = op
	}
	uc := conn.(*net.UnixConn)
	var mu sync.Mutex // one writer at a time
	for {
		body, _, err := receive(uc)
		if err != nil {
			return nil // the test has ended
		}
		var q request
		if err := json.Unmarshal(body, &q); err != nil {
			return err
		}
		go func() {
			r, file := answer(byName, q)
			mu.Lock()
			defer mu.Unlock()
			send(uc, r, file)
		}()
	}
}

func answer(ops map[string]Operation, q request) (response, *os.File) {
	r := response{ID: q.ID}
	op := ops[q.Op]
	if op == nil {
		r.Error = &RemoteError{Text: fmt.Sprintf("no operation %q: give it to testnet.AgentMain", q.Op)}
		return r, nil
	}
	result, file, err := op.serve(q.Args)
	if err == nil {
		r.Result, err = json.Marshal(result)
	}
	if err != nil {
		r.Error = &RemoteError{Text: err.Error()}
		errors.As(err, &r.Error.Errno)
	}
	return r, file
}

// send writes one response. A file goes ahead of it, in a message of its own, so that the agent's copy is closed when the
// test learns of the file: from then on the test alone decides how long the socket lives.
func send(c *net.UnixConn, r response, file *os.File) {
	if file != nil {
		ahead, _ := json.Marshal(response{ID: r.ID, Ahead: true})
		_, _, _ = c.WriteMsgUnix(ahead, syscall.UnixRights(int(file.Fd())), nil)
		file.Close()
	}
	body, err := json.Marshal(r)
	if err == nil && len(body) > maxMessage {
		err = fmt.Errorf("a result of %d bytes", len(body))
	}
	if err != nil {
		body, _ = json.Marshal(response{ID: r.ID, Error: &RemoteError{Text: err.Error()}})
	}
	_, _ = c.Write(body) // fails when the test has ended; so shall we
}
