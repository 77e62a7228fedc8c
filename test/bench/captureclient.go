// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pillionproxy/pillion/config"
	"golang.org/x/sys/unix"
)

const serverPort = 8080

// client makes connections one after another in each of its lanes. It speaks to the kernel by blocking calls, so that no
// event loop of the client stands in the times.
type client struct {
	target      string
	connections int
	parallel    int
	carried     bool
	bulk        int64
}

// sample is what one run of the client saw.
type sample struct {
	Connect   float64 `json:"connect_us"`    // median time of connect()
	FirstByte float64 `json:"first_byte_us"` // median time from before connect() to the first byte of the answer
	Rate      float64 `json:"rate"`          // connections per second
	Bulk      float64 `json:"bulk"`          // megabytes per second
}

func clientRole(args []string, stdout io.Writer) error {
	var c client
	flags := flag.NewFlagSet("bench client", flag.ContinueOnError)
	flags.Int64Var(&c.bulk, "bulk", 0, "instead, let one connection carry so many bytes")
	flags.StringVar(&c.target, "target", "", "address and port of the server")
	flags.IntVar(&c.connections, "connections", 1, "how many connections to make")
	flags.IntVar(&c.parallel, "parallel", 1, "how many at a time")
	flags.BoolVar(&c.carried, "carried", false, "fail unless every connection comes by a sidecar; else fail if one does")
	if err := flags.Parse(args); err != nil {
		return err
	}
	result, err := c.run()
	if err != nil {
		return err
	}
	return json.NewEncoder(stdout).Encode(result)
}

func (c client) run() (sample, error) {
	target, err := netip.ParseAddrPort(c.target)
	if err != nil {
		return sample{}, err
	}
	if c.bulk > 0 {
		return c.download(target)
	}
	type times struct{ connect, firstByte time.Duration }
	var (
		all  = make([]times, c.connections)
		errs = make([]error, c.parallel)
		next atomic.Int64
		wg   sync.WaitGroup
	)
	began := time.Now()
	for lane := range c.parallel {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= c.connections {
					return
				}
				connect, firstByte, err := exchange(target, c.carried)
				if err != nil {
					errs[lane] = fmt.Errorf("connection %d to %s: %w", i, target, err)
					return
				}
				all[i] = times{connect, firstByte}
			}
		})
	}
	wg.Wait()
	took := time.Since(began)
	if err := errors.Join(errs...); err != nil {
		return sample{}, err
	}
	of := func(f func(times) time.Duration) float64 {
		us := make([]float64, len(all))
		for i, t := range all {
			us[i] = float64(f(t)) / float64(time.Microsecond)
		}
		return median(us)
	}
	return sample{
		Connect:   of(func(t times) time.Duration { return t.connect }),
		FirstByte: of(func(t times) time.Duration { return t.firstByte }),
		Rate:      float64(c.connections) / took.Seconds(),
	}, nil
}

// wantBulk marks the first word of a client that wants so many bytes; others send a zero byte.
const wantBulk = 1 << 56

// Answers of the server: who dialled it, by the source port.
const (
	byApp     = 'a'
	bySidecar = 's'
)

// exchange connects, sends a byte, waits for the answer and for the end, and closes. A connection that went another way
// than it should is an error: a fast bypass must not look like a fast sidecar.
func exchange(target netip.AddrPort, carried bool) (connect, firstByte time.Duration, err error) {
	family, address := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: int(target.Port()), Addr: target.Addr().As16()})
	if target.Addr().Is4() {
		family, address = unix.AF_INET, &unix.SockaddrInet4{Port: int(target.Port()), Addr: target.Addr().As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, 0, err
	}
	defer unix.Close(fd)
	limit := unix.Timeval{Sec: 10}
	for _, option := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, option, &limit); err != nil {
			return 0, 0, err
		}
	}

	var buf [1]byte
	began := time.Now()
	if err := retry(func() error { return unix.Connect(fd, address) }); err != nil {
		return 0, 0, fmt.Errorf("connect: %w", err)
	}
	connect = time.Since(began)
	if _, err := unix.Write(fd, buf[:]); err != nil {
		return 0, 0, fmt.Errorf("write: %w", err)
	}
	var n int
	read := func() error { n, err = unix.Read(fd, buf[:]); return err }
	if err := retry(read); err != nil || n != 1 {
		return 0, 0, fmt.Errorf("read: %d bytes: %w", n, err)
	}
	firstByte = time.Since(began)
	if got := buf[0] == bySidecar; got != carried {
		return 0, 0, fmt.Errorf("came by a sidecar: %t, expected %t", got, carried)
	}
	// The server closes first, so that no port of the client's waits in TIME_WAIT.
	if err := retry(read); err != nil || n != 0 {
		return 0, 0, fmt.Errorf("end of the answer: %d bytes: %w", n, err)
	}
	return connect, firstByte, nil
}

// download reads what the server sends for as long as it sends.
func (c client) download(target netip.AddrPort) (s sample, err error) {
	conn, err := net.Dial("tcp", target.String())
	if err != nil {
		return s, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return s, err
	}
	began := time.Now()
	if err := binary.Write(conn, binary.BigEndian, wantBulk|c.bulk); err != nil {
		return s, err
	}
	var by [1]byte
	if _, err := io.ReadFull(conn, by[:]); err != nil {
		return s, err
	}
	if got := by[0] == bySidecar; got != c.carried {
		return s, fmt.Errorf("came by a sidecar: %t, expected %t", got, c.carried)
	}
	n, err := io.Copy(io.Discard, conn)
	if err != nil || n != c.bulk {
		return s, fmt.Errorf("%d bytes of %d came: %w", n, c.bulk, err)
	}
	return sample{Bulk: float64(n) / 1e6 / time.Since(began).Seconds()}, nil
}

// retry repeats a call that Go's preemption signals interrupted.
func retry(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func serverRole(_ []string, stdout io.Writer) error { return serve(stdout) }

// serve answers the first byte of each connection and closes it. It says so once it listens, and serves until it is killed.
func serve(ready io.Writer) error {
	l, err := plainTCP().Listen(context.Background(), "tcp", fmt.Sprintf("[::]:%d", serverPort))
	if err != nil {
		return err
	}
	fmt.Fprintln(ready, "ready")
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go answer(conn)
	}
}

func answer(conn net.Conn) {
	defer conn.Close()
	var buf [1]byte
	if _, err := conn.Read(buf[:]); err != nil {
		return
	}
	var bulk int64
	if buf[0] != 0 { // the first byte of wantBulk, and the count behind it
		var rest [7]byte
		if _, err := io.ReadFull(conn, rest[:]); err != nil {
			return
		}
		bulk = int64(binary.BigEndian.Uint64(append([]byte{0}, rest[:]...)))
	}
	buf[0] = byApp
	if config.DialOutbound.Contains(conn.RemoteAddr().(*net.TCPAddr).AddrPort().Port()) {
		buf[0] = bySidecar
	}
	_, _ = conn.Write(buf[:])
	for chunk := make([]byte, 1<<20); bulk > 0; bulk -= int64(len(chunk)) {
		if _, err := conn.Write(chunk[:min(bulk, int64(len(chunk)))]); err != nil {
			return
		}
	}
}

func plainTCP() *net.ListenConfig {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // Go's default would make every listener an MPTCP one
	return &lc
}
