// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"math"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// loadClient keeps lanes of exchanges going, each a closed loop: the next request goes out when the answer is complete.
type loadClient struct {
	target   netip.AddrPort
	sources  netip.Prefix // the addresses that it dials from
	carried  bool
	answer   int // bytes
	parallel int
	fresh    bool // each exchange has a connection of its own
	warmup   int  // exchanges of each lane before it counts
	window   time.Duration
	hold     []int
	poll     bool

	poller  *poller
	lanes   byDescriptor[lane]
	buf     []byte
	dialled int
	took    []time.Duration
}

// loadSample is what the client says: first that it is ready, then what it saw.
type loadSample struct {
	Exchanges int     `json:"exchanges"`
	Seconds   float64 `json:"seconds"`
	P50       float64 `json:"p50_us"`
	P99       float64 `json:"p99_us"`
	Until     int64   `json:"until_ns"` // with -poll: when the first answer was complete, by CLOCK_MONOTONIC
}

// lane is a place for one connection at a time.
type lane struct {
	fd    int // -1: none
	state laneState
	rest  int // bytes of the answer
	began time.Time
}

type laneState int

const (
	resting laneState = iota
	connecting
	waiting // for the rest of an answer
	ending  // for the end of the connection
)

func loadClientRole(args []string, stdout io.Writer) error {
	var c loadClient
	flags := flag.NewFlagSet("bench load-client", flag.ContinueOnError)
	flags.TextVar(&c.target, "target", netip.AddrPort{}, "IPv4 address and port of the server")
	flags.TextVar(&c.sources, "sources", netip.Prefix{}, "IPv4 addresses to dial from")
	flags.BoolVar(&c.carried, "carried", false, "fail unless every connection comes by a sidecar; else fail if one does")
	flags.IntVar(&c.answer, "answer", 128, "bytes of an answer")
	flags.IntVar(&c.parallel, "parallel", 1, "exchanges at a time")
	flags.BoolVar(&c.fresh, "fresh", false, "a new connection for each exchange; the server closes it first")
	flags.IntVar(&c.warmup, "warmup", 1, "exchanges of each lane before it counts")
	flags.DurationVar(&c.window, "window", time.Second, "how long to count")
	flags.BoolVar(&c.poll, "poll", false, "instead, try until there is an answer")
	flags.Func("hold", "instead, have so many connections with one exchange each, then so many, ...", func(s string) error {
		for _, field := range strings.Split(s, ",") {
			n, err := strconv.Atoi(field)
			if err != nil {
				return err
			}
			c.hold = append(c.hold, n)
		}
		return nil
	})
	if err := flags.Parse(args); err != nil {
		return err
	}
	return c.run(os.Stdin, stdout)
}

// run writes a sample after each step and reads a line before the next. It ends, and its connections with it, when there is
// no more to read.
func (c *loadClient) run(stdin io.Reader, stdout io.Writer) (err error) {
	if c.poller, err = newPoller(); err != nil {
		return err
	}
	c.buf = make([]byte, 256<<10)
	steps := []func() (loadSample, error){c.warm, c.measure}
	switch {
	case c.poll:
		steps = []func() (loadSample, error){func() (loadSample, error) { return loadSample{}, nil }, c.untilAnswered}
	case len(c.hold) > 0:
		steps = nil
		for _, n := range c.hold {
			steps = append(steps, func() (loadSample, error) { return loadSample{}, c.open(n) })
		}
	}
	lines, out := bufio.NewScanner(stdin), json.NewEncoder(stdout)
	for _, step := range steps {
		s, err := step()
		if err != nil {
			return err
		}
		if err := out.Encode(s); err != nil {
			return err
		}
		if !lines.Scan() {
			break
		}
	}
	return lines.Err()
}

func (c *loadClient) warm() (loadSample, error) {
	var lanes []*lane
	for range c.parallel {
		lanes = append(lanes, &lane{fd: -1})
	}
	left := c.warmup*c.parallel - c.parallel
	return loadSample{}, c.exchange(lanes, func(l *lane) *lane {
		if left--; left < 0 {
			return nil
		}
		return l
	})
}

func (c *loadClient) measure() (loadSample, error) {
	lanes := slices.DeleteFunc(slices.Clone(c.lanes), func(l *lane) bool { return l == nil })
	for len(lanes) < c.parallel {
		lanes = append(lanes, &lane{fd: -1})
	}
	c.took = make([]time.Duration, 0, 1<<20)
	began := time.Now()
	err := c.exchange(lanes, func(l *lane) *lane {
		if time.Since(began) < c.window {
			return l
		}
		return nil
	})
	took := time.Since(began)
	slices.Sort(c.took)
	return loadSample{
		Exchanges: len(c.took), Seconds: took.Seconds(),
		P50: microseconds(quantile(c.took, 0.50)), P99: microseconds(quantile(c.took, 0.99)),
	}, err
}

// open makes connections until there are n.
func (c *loadClient) open(n int) error {
	n -= c.dialled
	one := func(*lane) *lane {
		if n == 0 {
			return nil
		}
		n--
		return &lane{fd: -1}
	}
	var lanes []*lane
	for range c.parallel {
		if l := one(nil); l != nil {
			lanes = append(lanes, l)
		}
	}
	return c.exchange(lanes, one)
}

// untilAnswered tries again and again: what is waited for does not run yet.
func (c *loadClient) untilAnswered() (s loadSample, err error) {
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(100 * time.Microsecond) {
		l := &lane{fd: -1}
		err = c.exchange([]*lane{l}, func(*lane) *lane { return nil })
		if err == nil {
			s.Until, err = monotonic()
			return s, err
		}
		if l.fd >= 0 {
			c.close(l)
		}
	}
	return s, fmt.Errorf("no answer in %s: %w", patience, err)
}

// exchange has the lanes begin, and those that next returns, each when another is done; it ends when all are.
func (c *loadClient) exchange(lanes []*lane, next func(*lane) *lane) error {
	for _, l := range lanes {
		if err := c.begin(l); err != nil {
			return err
		}
	}
	for active := len(lanes); active > 0; {
		events, err := c.poller.wait(int(patience.Milliseconds()))
		if err != nil {
			return err
		}
		if len(events) == 0 {
			return fmt.Errorf("nothing has come from %s for %s; %d exchanges wait", c.target, patience, active)
		}
		for _, e := range events {
			l := c.lanes[e.Fd]
			done, err := c.step(l)
			if err != nil {
				return fmt.Errorf("exchange %d with %s: %w", len(c.took)+1, c.target, err)
			}
			if !done {
				continue
			}
			if l = next(l); l == nil {
				active--
			} else if err := c.begin(l); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *loadClient) begin(l *lane) error {
	l.began = time.Now()
	if l.fd < 0 {
		return c.dial(l)
	}
	return c.ask(l)
}

// perSource is how many connections go out from one address: fewer than the ports of Pillion's dials, which are made from
// that address, and than half of Linux's ephemeral range, of which connect() takes one half first. So no two connections of
// a run have the same addresses and ports, and none meets what another has left in TIME_WAIT or in conntrack.
const perSource = 4000

func (c *loadClient) dial(l *lane) error {
	source := c.sources.Addr().As4()
	n := 1 + c.dialled/perSource
	if source[3] += byte(n); n > 254 || !c.sources.Contains(netip.AddrFrom4(source)) {
		return fmt.Errorf("%d connections were made: there is no unused port in %s", c.dialled, c.sources)
	}
	c.dialled++
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	l.fd, l.state = fd, connecting
	c.lanes.set(fd, l)
	// The port is chosen by connect(), which knows which are free towards this server.
	for _, o := range []struct{ level, option int }{{unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT}, {unix.IPPROTO_TCP, unix.TCP_NODELAY}} {
		if err := unix.SetsockoptInt(fd, o.level, o.option, 1); err != nil {
			return fmt.Errorf("setsockopt: %w", err)
		}
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: source}); err != nil {
		return fmt.Errorf("bind to %s: %w", netip.AddrFrom4(source), err)
	}
	err = unix.Connect(fd, &unix.SockaddrInet4{Port: int(c.target.Port()), Addr: c.target.Addr().As4()})
	if err != nil && err != unix.EINPROGRESS {
		return fmt.Errorf("connect to %s: %w", c.target, err)
	}
	return c.poller.add(fd, unix.EPOLLOUT)
}

func (c *loadClient) ask(l *lane) error {
	r := newRequest(c.answer, c.fresh)
	if n, err := unix.Write(l.fd, r[:]); err != nil || n < len(r) {
		return fmt.Errorf("connect, or write %d bytes of a request: %w", n, err)
	}
	l.state, l.rest = waiting, c.answer
	return nil
}

// step goes on with a lane on which something happened. done: its exchange is over.
func (c *loadClient) step(l *lane) (done bool, err error) {
	if l.state == connecting {
		if err := c.ask(l); err != nil {
			return false, err
		}
		return false, c.poller.change(l.fd, unix.EPOLLIN)
	}
	n, err := unix.Read(l.fd, c.buf)
	switch {
	case err == unix.EAGAIN:
		return false, nil
	case err != nil:
		return false, fmt.Errorf("read: %w", err)
	case n == 0 && l.state == ending:
		c.close(l)
		return true, nil
	case n == 0:
		return false, fmt.Errorf("the connection ended, %d bytes before its answer did", l.rest)
	case n > l.rest:
		return false, fmt.Errorf("%d bytes came, and %d were asked for", n, l.rest)
	}
	// A fast bypass must not look like a fast proxy.
	if got := c.buf[0] == bySidecar; got != c.carried {
		return false, fmt.Errorf("came by a sidecar: %t, expected %t", got, c.carried)
	}
	if l.rest -= n; l.rest > 0 {
		return false, nil
	}
	c.took = append(c.took, time.Since(l.began))
	if l.state = resting; c.fresh {
		l.state = ending
	}
	return !c.fresh, nil
}

func (c *loadClient) close(l *lane) {
	_ = unix.Close(l.fd)
	c.lanes[l.fd] = nil
	l.fd = -1
}

// quantile of sorted values: the least that is not below so large a part of them.
func quantile(sorted []time.Duration, part float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[max(int(math.Ceil(part*float64(len(sorted))))-1, 0)]
}

func microseconds(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// monotonic is the clock that all processes of a host share.
func monotonic() (int64, error) {
	var now unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
	return now.Nano(), err
}
