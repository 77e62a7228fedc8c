// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// TestUrgentData is row 26: urgent data comes through as such, in both directions, and whatever becomes of it the stream
// goes on. A relay that does not think of it takes the urgent byte for the end of the stream, or loses it, or stalls.
func TestUrgentData(t *testing.T) {
	t.Parallel()
	p := newCaptured(t, inside)
	for _, w := range p.paths() {
		for _, direction := range []string{"to the server", "to the client"} {
			for _, tt := range []struct {
				name string
				send func(*net.TCPConn, <-chan struct{}) error
				read func(*net.TCPConn, chan<- struct{}) error
			}{
				{"abc!def", sendABC, readABC},
				{"1 MB", sendMegabyte, readMegabyte},
			} {
				t.Run(w.name+"/"+direction+"/"+tt.name, func(t *testing.T) {
					err := p.urgent(t, w, direction == "to the server", tt.send, tt.read)
					// An urgent byte that comes just as the proxy looks, finds nothing, and reads is passed on as any other.
					for again := 0; errors.Is(err, errNotUrgent) && again < 5; again++ {
						t.Log(err)
						err = p.urgent(t, w, direction == "to the server", tt.send, tt.read)
					}
					if err != nil {
						t.Error(err)
					}
				})
			}
		}
	}
}

// urgent makes one connection, with the sender at either side.
func (p *pod) urgent(t *testing.T, w path, toServer bool, send func(*net.TCPConn, <-chan struct{}) error, read func(*net.TCPConn, chan<- struct{}) error) error {
	got := make(chan struct{}, 10)
	client := func(c *net.TCPConn) error { return send(c, got) }
	server := func(c *net.TCPConn) error { return read(c, got) }
	if !toServer {
		client, server = server, client
	}
	served := make(chan error, 1)
	c, err := w.dial(w.start(func(c *net.TCPConn) { served <- server(c) }))
	if err != nil {
		return err
	}
	defer c.Close()
	if err := errors.Join(client(c.TCPConn), c.Close(), <-served); err != nil {
		return err
	}
	if r := p.proxy.waitRecord(t, c.Own); r.Reason != "ok" {
		return fmt.Errorf("record %+v, want reason ok", r)
	}
	return nil
}

var errNotUrgent = errors.New("the urgent byte came as one like the others")

// sendABC sends one part when the one before has arrived: urgent data that is overtaken by other data may be read with
// it. The last part is the end.
func sendABC(c *net.TCPConn, got <-chan struct{}) error {
	for _, part := range []string{"abc", "!", "def"} {
		flags := 0
		if part == "!" {
			flags = unix.MSG_OOB
		}
		if err := sendFlags(c, []byte(part), flags); err != nil {
			return fmt.Errorf("send %q: %w", part, err)
		}
		if _, ok := <-got; !ok {
			return nil // the reader says why
		}
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, c)
	return err
}

// readABC reads as programs do that know of urgent data: apart from the stream.
func readABC(c *net.TCPConn, got chan<- struct{}) error {
	defer close(got)
	if err := readExactly(c, "abc"); err != nil {
		return err
	}
	got <- struct{}{}
	if b, err := readUrgent(c); err != nil || b != '!' {
		return fmt.Errorf("urgent byte %q, want '!': %w", b, err)
	}
	got <- struct{}{}
	if err := readExactly(c, "def"); err != nil {
		return err
	}
	got <- struct{}{}
	rest, err := io.ReadAll(pastUrgent{c})
	if len(rest) > 0 {
		return fmt.Errorf("%q after the end", rest)
	}
	return errors.Join(err, c.CloseWrite())
}

const urgentParts, urgentPart = 20, 50_000

// sendMegabyte sends urgent bytes among much data, as fast as it goes.
func sendMegabyte(c *net.TCPConn, _ <-chan struct{}) error {
	data := payload(5, urgentParts*urgentPart)
	for i := range urgentParts {
		part := data[i*urgentPart:][:urgentPart]
		if err := sendFlags(c, part[:urgentPart-1], 0); err != nil {
			return fmt.Errorf("part %d: %w", i, err)
		}
		if err := sendFlags(c, part[urgentPart-1:], unix.MSG_OOB); err != nil {
			return fmt.Errorf("urgent byte of part %d: %w", i, err)
		}
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, c)
	return err
}

// readMegabyte has the urgent bytes in line, where none may be missing.
func readMegabyte(c *net.TCPConn, _ chan<- struct{}) error {
	if err := withDescriptor(c, func(fd int) error {
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1)
	}); err != nil {
		return err
	}
	got, err := io.ReadAll(pastUrgent{c})
	if want := payload(5, urgentParts*urgentPart); err == nil && !bytes.Equal(got, want) {
		err = fmt.Errorf("read %s, want %s", wantSum(got), wantSum(want))
	}
	return errors.Join(err, c.CloseWrite())
}

// pastUrgent reads where there is urgent data. At the urgent byte, a read says EAGAIN while a signal is pending, whatever
// there is to read; Go's scheduler sends signals, and Go's net package then waits for input that is there already.
type pastUrgent struct{ *net.TCPConn }

func (c pastUrgent) Read(b []byte) (n int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	rerr := raw.Read(func(fd uintptr) bool {
		for {
			n, err = unix.Read(int(fd), b)
			if err != unix.EAGAIN && err != unix.EINTR {
				return true
			}
			p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			if ready, perr := unix.Poll(p, 0); perr == nil && ready == 0 {
				return false
			}
		}
	})
	switch {
	case rerr != nil:
		return 0, rerr
	case n == 0 && err == nil:
		err = io.EOF
	}
	return max(n, 0), err
}

func withDescriptor(c *net.TCPConn, f func(fd int) error) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) { err = f(int(fd)) })
	return errors.Join(cerr, err)
}

// sendFlags sends all of data; with MSG_OOB, one byte.
func sendFlags(c *net.TCPConn, data []byte, flags int) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	for len(data) > 0 {
		var n int
		werr := raw.Write(func(fd uintptr) bool {
			n, err = unix.SendmsgN(int(fd), data, nil, nil, flags|unix.MSG_NOSIGNAL)
			return err != unix.EAGAIN && err != unix.EINTR
		})
		if err := errors.Join(werr, err); err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}

// readUrgent waits for a byte of urgent data.
func readUrgent(c *net.TCPConn) (b byte, err error) {
	err = withDescriptor(c, func(fd int) error {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI | unix.POLLIN}}
		if err := retry(func() (err error) { _, err = unix.Poll(p, 60_000); return err }); err != nil {
			return err
		}
		if p[0].Revents == 0 {
			return errors.New("waited in vain for an urgent byte")
		}
		if p[0].Revents&unix.POLLPRI == 0 {
			n, err := unix.Read(fd, make([]byte, 10))
			if n == 1 {
				return errNotUrgent
			}
			return fmt.Errorf("no urgent byte, but %d bytes, %v", n, err)
		}
		buf := make([]byte, 1)
		_, _, err := unix.Recvfrom(fd, buf, unix.MSG_OOB)
		b = buf[0]
		return err
	})
	return b, err
}

// retry makes a system call again that a signal of Go's scheduler interrupted.
func retry(call func() error) error {
	err := call()
	for err == unix.EINTR {
		err = call()
	}
	return err
}
