// SPDX-License-Identifier: Apache-2.0

// Package loop carries connections at the cost of an event loop, by handlers that read from top to bottom.
//
// A Group has one Loop for each processor. A Loop has an epoll descriptor and one goroutine, and calls a connection's Handler
// when an idle connection has input. The handler runs on a coroutine: where it would have to wait (Conn.Recv, Conn.Send, Dial,
// Sleep, ...) it is parked, and the loop goes on with others. When it returns, its connection is idle, and costs nothing but its
// Conn. There is no other state: a connection just accepted, a quiet relay and the gap between two requests are all "no handler
// runs". What is to be kept meanwhile is in Conn.State.
//
//	func echo(c *loop.Conn) {
//		buf := c.Loop().Buffer()
//		defer c.Loop().Release(buf)
//		n, err := c.TryRecv(buf)
//		switch {
//		case err == loop.ErrAgain: // nothing there: be idle
//		case err == io.EOF:
//			c.Close()
//		case err != nil || c.Send(buf[:n]) != nil:
//			c.Abort()
//		} // if there is more, the loop calls again, after the others
//	}
//
// What always holds, and what a handler may do:
//
//  1. One coroutine of a loop runs at a time, resumed by the loop's goroutine alone. So what belongs to a loop (its connections,
//     buffers, Loop.State) needs no lock, and must not be touched from elsewhere; Loop.Post, Loop.Do, Group.Go and Group.Run
//     lead into a loop.
//  2. A coroutine is parked at one point, and is woken once. A wake is a hint: whoever waits tries again, and waits again.
//  3. A connection belongs to one loop. Its descriptor is closed once, there, by Close, Abort or a panic of its handler; whoever is
//     parked on it is woken with net.ErrClosed. Nobody outside sees the descriptor, but for options (Conn.Control).
//  4. A parked handler may hold Go values, connections, and a buffer with what is yet to be sent. It holds no lock (the next
//     handler that wants it would stop the loop for ever), no locked thread (the runtime would end the process: "coro: OS thread
//     locking must match"), and no buffer while it waits for input.
//  5. Nothing may block on a loop: its other connections would wait. What blocks, or takes long, goes to Loop.Offload. The
//     watchdog logs the stack of a handler that has held its loop for longer than Config.Stall.
//  6. A handler that waits for something else is woken with ErrGone when its own connection is reset, so that nobody works for a
//     client who is gone. The end of the client's stream is no such thing.
//  7. A handler that panics, or calls runtime.Goexit, loses its connection. Nobody else notices, but for a line in the log.
//  8. A socket is born with SO_LINGER{1,0}: a process that dies, by whatever cause, is seen by its peers as a reset and never as a
//     clean end. Close takes that away. Linger has no other value: with one, close(2) would wait (socket(7)).
//  9. Input is reported by edges (EPOLLET): a readiness bit is set by an event, and cleared only by a call that found nothing, or
//     got less than it had room for while no end and no urgent data was announced.
//
// Buffers are lent from outside of the Go heap: the garbage collector never sees them. A buffer that was released must not be
// touched; it may be unmapped. Buffers, pipes and coroutines that nobody needs for a second or two are given back to the system.
package loop
