// SPDX-License-Identifier: Apache-2.0

package loop_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/pillionproxy/pillion/proxy/loop"
)

// greeter is what a connection has to remember while no handler runs.
type greeter struct {
	line  []byte // of which the end has not come yet
	count int
}

// greet is a handler: it answers each line that has come, and returns to be idle. Nothing in it waits for a goroutine, and nothing
// has to be locked.
func greet(c *loop.Conn) {
	g := c.State.(*greeter)
	for {
		buf := c.Loop().Buffer()
		n, err := c.TryRecv(buf)
		g.line = append(g.line, buf[:n]...)
		c.Loop().Release(buf) // before anything that waits
		switch {
		case err == loop.ErrAgain:
			c.SetDeadline(c.Loop().Now().Add(time.Minute)) // of silence
			return
		case err == io.EOF:
			c.Close() // what was sent still arrives
			return
		case err != nil: // a reset, the deadline, or the end of the group
			c.Abort()
			return
		}
		for line := range strings.Lines(string(g.line)) {
			if !strings.HasSuffix(line, "\n") {
				break
			}
			g.count++
			g.line = g.line[len(line):]
			if err := c.Loop().Sleep(time.Millisecond); err != nil { // others are served meanwhile
				return // it is closed, or about to be
			}
			if _, err := c.Send(fmt.Appendf(nil, "%d: hello, %s", g.count, line)); err != nil {
				c.Abort()
				return
			}
		}
	}
}

// A server, and somebody who talks to it.
func Example() {
	group, err := loop.New(loop.Config{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer group.Close()
	var config net.ListenConfig
	config.SetMultipathTCP(false)
	listener, err := config.Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	address := listener.Addr().String()
	serving, err := group.Serve(listener.(*net.TCPListener), func(c *loop.Conn, _ netip.AddrPort) {
		c.State = new(greeter)
		c.Handle(greet)
	}, func(err error) { fmt.Println(err) })
	if err != nil {
		fmt.Println(err)
		return
	}
	defer serving.Close()

	c, err := net.Dial("tcp", address)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer c.Close()
	answers := bufio.NewReader(c)
	for _, text := range []string{"Ada\nGr", "ace\n"} {
		fmt.Fprint(c, text)
		answer, _ := answers.ReadString('\n')
		fmt.Print(answer)
	}
	// Output:
	// 1: hello, Ada
	// 2: hello, Grace
}
