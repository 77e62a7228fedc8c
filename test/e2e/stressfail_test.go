// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/pillionproxy/pillion/test/testnet"
)

// fail notes the first failure, with all that is known of the stream. The driver's own goroutine ends the test.
func (s *stress) fail(side *streamSide, format string, args ...any) {
	if s.ending() {
		return // taken down: what ends now ends because of that
	}
	what := fmt.Sprintf(format, args...)
	text := fmt.Sprintf("%s\nof %s\n%s", what, side, s.scene(side))
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed == "" {
		s.failed = text
	}
}

// check ends the test if something has failed.
func (s *stress) check() {
	s.t.Helper()
	if bad := s.log.faulty(); bad != "" {
		s.t.Fatalf("PILLION_STRESS_SEED=%d: the proxy said:\n%s", s.seed, bad)
	}
	now := s.world.uptime()
	for side := range s.active() {
		side.mu.Lock()
		still := now - side.progress
		side.mu.Unlock()
		if still > patient {
			s.fail(side, "stands still for %s of the proxy's time\nthe proxy's goroutines:\n%s", still, s.goroutines())
		}
	}
	s.mu.Lock()
	failed := s.failed
	s.mu.Unlock()
	if failed != "" {
		s.t.Fatalf("PILLION_STRESS_SEED=%d: %s", s.seed, failed)
	}
}

// scene is what can be seen of a stream from outside.
func (s *stress) scene(side *streamSide) string {
	side.mu.Lock()
	p, begun := side.plan, side.begun
	side.mu.Unlock()
	var b strings.Builder
	fmt.Fprintf(&b, "begun at %.3fs; it is %.3fs\n", begun.Sub(s.world.began).Seconds(), time.Since(s.world.began).Seconds())
	fmt.Fprintf(&b, "what has happened since:\n%s", s.world.tell(begun.Add(-time.Second)))
	for _, ns := range []*testnet.Namespace{s.ns, s.ext} {
		fmt.Fprintf(&b, "sockets of %s:\n", ns.Name)
		for _, k := range ns.Sockets() {
			l, r := unmap(k.Local), unmap(k.Remote)
			// Both sides of it: the proxy's dial has the one end of the stream, and a port of its own.
			if l == p.Own && p.Own.IsValid() || r == p.Own && p.Own.IsValid() || (l == p.To || r == p.To) && (k.State == testnet.SynSent || k.State == testnet.Listen || !p.Own.IsValid()) {
				fmt.Fprintf(&b, "  %+v\n", k)
			}
		}
	}
	own := ""
	if p.Own.IsValid() {
		own = p.Own.String()
	}
	fmt.Fprintf(&b, "the proxy's log:\n%s", s.log.about(own))
	return b.String()
}

// abort ends the connection of a side, so that whoever waits for it goes on.
func (s *streamSide) abort() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.c != nil {
		s.c.Close()
	}
}

// weight is what a process holds.
type weight struct{ descriptors, goroutines int }

// admin asks the proxy's admin interface.
func (s *stress) admin(path string) (string, error) {
	c, err := s.ns.Dial("tcp4", "127.0.0.1:16000")
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil { // it may be stopped
		return "", err
	}
	if _, err := fmt.Fprintf(c, "GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n", path); err != nil {
		return "", err
	}
	r, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return string(b), err
}

func (s *stress) goroutines() string {
	text, err := s.admin("/debug/pprof/goroutine?debug=1")
	if err != nil {
		return err.Error()
	}
	return tail(text, 20_000)
}

// weigh counts what the proxy holds.
func (s *stress) weigh() (w weight) {
	s.t.Helper()
	text, err := s.admin("/debug/pprof/goroutine?debug=1")
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := fmt.Sscanf(text, "goroutine profile: total %d", &w.goroutines); err != nil {
		s.t.Fatalf("%v: %.100s", err, text)
	}
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.proxy.Process.Pid))
	if err != nil {
		s.t.Fatal(err)
	}
	w.descriptors = len(fds)
	return w
}

// compare waits until the proxy holds no more than one that has carried nothing, and no socket is left anywhere.
func (s *stress) compare(baseline weight) {
	s.t.Helper()
	var now weight
	var left []testnet.Socket
	defer func() {
		if s.t.Failed() {
			s.t.Logf("the proxy holds %+v, at first it held %+v\n%s\nsockets: %+v", now, baseline, s.goroutines(), left)
		}
	}()
	testnet.Wait(s.t, "the proxy holds what it did at first", func() bool {
		now = s.weigh()
		return now.descriptors <= baseline.descriptors && now.goroutines <= baseline.goroutines
	})
	const timeWait = 6
	testnet.Wait(s.t, "no socket is left", func() bool {
		left = nil
		for _, ns := range []*testnet.Namespace{s.ns, s.ext} {
			for _, k := range ns.Sockets() {
				if k.State != testnet.Listen && k.State != timeWait {
					left = append(left, k)
				}
			}
		}
		return len(left) == 0
	})
}
