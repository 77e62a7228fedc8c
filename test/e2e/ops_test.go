// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"

	"github.com/pillionproxy/pillion/test/testnet"
)

// What an agent can do, beside dialling and listening: see testnet.Op.
var (
	stormOp  = testnet.NewOp("storm", storm)
	udpOp    = testnet.NewOp("udp", udp)
	forkOp   = testnet.NewOp("fork", fork)
	becomeOp = testnet.NewOp("become", become)
)

// stormArgs asks for many connections at the same time.
type stormArgs struct {
	To    string
	Count int
}

// stormResult counts how they ended.
type stormResult struct {
	OK     int
	Errors map[string]int
}

// storm opens all connections, waits until all are open (or failed), and then makes an exchange on each, with an answer
// of its own.
func storm(args stormArgs) (stormResult, error) {
	r := stormResult{Errors: map[string]int{}}
	var mu sync.Mutex
	var open, done sync.WaitGroup
	open.Add(args.Count)
	for i := range args.Count {
		done.Go(func() {
			err := stormOne(args.To, fmt.Sprintf("connection %d of %d", i, args.Count), &open)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				r.OK++
				return
			}
			kind := err.Error()
			if errno := syscall.Errno(0); errors.As(err, &errno) {
				kind = errno.Error()
			}
			r.Errors[kind]++
		})
	}
	done.Wait()
	return r, nil
}

func stormOne(to, message string, open *sync.WaitGroup) error {
	c, err := net.Dial("tcp", to)
	if err == nil {
		defer c.Close()
		err = exchange(c, "first "+message)
	}
	open.Done()
	open.Wait()
	if err != nil {
		return err
	}
	if err := exchange(c, message); err != nil {
		return err
	}
	return finish(c.(*net.TCPConn))
}

// udp asks by a datagram and returns the answer. It is told every ICMP error, as resolvers ask to be.
func udp(to string) (string, error) {
	d := net.Dialer{Control: func(network, _ string, c syscall.RawConn) (err error) {
		level, opt := syscall.SOL_IP, syscall.IP_RECVERR
		if network == "udp6" {
			level, opt = syscall.SOL_IPV6, syscall.IPV6_RECVERR
		}
		cerr := c.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), level, opt, 1) })
		return errors.Join(cerr, err)
	}}
	c, err := d.Dial("udp", to)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if _, err := c.Write([]byte("datagram")); err != nil {
		return "", err
	}
	b := make([]byte, 100)
	n, err := c.Read(b)
	return string(b[:n]), err
}

const childEnv = "E2E_FORKED_CHILD"

// fork connects from a child process, and returns the child's own address once its exchange is over.
func fork(to string) (netip.AddrPort, error) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{childEnv + "=" + to}
	out, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		err = fmt.Errorf("%w: %s", err, exit.Stderr)
	}
	if err != nil {
		return netip.AddrPort{}, err
	}
	return netip.ParseAddrPort(strings.TrimSpace(string(out)))
}

// forkedChild is the child process of fork; in any other it does nothing.
func forkedChild() {
	to := os.Getenv(childEnv)
	if to == "" {
		return
	}
	c, err := net.Dial("tcp", to)
	if err == nil {
		own := c.LocalAddr()
		if err = errors.Join(exchange(c, "through the sidecar"), finish(c.(*net.TCPConn))); err == nil {
			fmt.Println(own)
			os.Exit(0)
		}
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

const serverEnv = "E2E_SERVING_CHILD"

// servingChild is a shell word that runs this test binary as a server that echoes, and says "listening" once it does.
func servingChild(addr string) string {
	return fmt.Sprintf("exec env %s=%s %s", serverEnv, addr, selfPath)
}

// serveAsChild is the process of servingChild; in any other it does nothing.
func serveAsChild() {
	addr := os.Getenv(serverEnv)
	if addr == "" {
		return
	}
	ln, err := net.Listen("tcp", addr) // as any Go program does: with MPTCP
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("listening")
	for {
		c, err := ln.Accept()
		if err != nil {
			os.Exit(1)
		}
		go func() {
			_, _ = io.Copy(c, c)
			c.Close()
		}()
	}
}

// become gives the agent another user for good, by setuid in all its threads.
func become(uid int) (struct{}, error) {
	return struct{}{}, errors.Join(syscall.Setgroups(nil), syscall.Setgid(uid), syscall.Setuid(uid))
}
