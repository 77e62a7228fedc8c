// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"fmt"
	"strings"
	"sync"
	"time"
)

// modes is a set of failure policies.
type modes uint8

const (
	modeHold modes = 1 << iota
	modeOpen
	modeClosed
)

var modeNames = map[modes]string{modeHold: "hold", modeOpen: "open", modeClosed: "closed"}

func (m modes) String() string {
	var names []string
	for _, one := range []modes{modeHold, modeOpen, modeClosed} {
		if m&one != 0 {
			names = append(names, modeNames[one])
		}
	}
	return strings.Join(names, " or ")
}

// weather is what a stream may have met: while it lasted, the proxy was down at some time, and these were the policies.
type weather struct {
	down              bool
	outbound, inbound modes
}

func (w weather) String() string {
	state := "up"
	if w.down {
		state = "down"
	}
	return fmt.Sprintf("proxy %s, outbound %s, inbound %s", state, w.outbound, w.inbound)
}

// of is the policy of a direction.
func (w weather) of(inbound bool) modes {
	if inbound {
		return w.inbound
	}
	return w.outbound
}

// stressWorld remembers how the world was, and measures the time in which the proxy was able to do something: what
// counts for a stream that does not get on.
type stressWorld struct {
	began time.Time

	mu      sync.Mutex
	history []change
	upSince time.Time // zero while the proxy is down or stopped
	up      time.Duration
}

type change struct {
	at   time.Time
	what string
	weather
}

func newStressWorld(w weather) *stressWorld {
	now := time.Now()
	return &stressWorld{began: now, upSince: now, history: []change{{now, "start", w}}}
}

// change takes effect before the thing itself is done, if it makes more possible, and after it otherwise: so a stream
// may meet what is not in its weather never, and what is in it perhaps.
func (w *stressWorld) change(what string, f func(*weather)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	next := w.history[len(w.history)-1].weather
	f(&next)
	w.history = append(w.history, change{time.Now(), what, next})
}

// clock stops and starts the time that counts.
func (w *stressWorld) clock(run bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.upSince.IsZero() {
		w.up += time.Since(w.upSince)
	}
	w.upSince = time.Time{}
	if run {
		w.upSince = time.Now()
	}
}

// uptime is for how long the proxy could work.
func (w *stressWorld) uptime() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.upSince.IsZero() {
		return w.up
	}
	return w.up + time.Since(w.upSince)
}

// since is everything that may have been met since a moment.
func (w *stressWorld) since(from time.Time) (all weather) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := len(w.history) - 1; i >= 0; i-- {
		c := w.history[i]
		all.down = all.down || c.down
		all.outbound |= c.outbound
		all.inbound |= c.inbound
		if c.at.Before(from) {
			break
		}
	}
	return all
}

// tell is what has happened since a moment, for a report.
func (w *stressWorld) tell(from time.Time) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var b strings.Builder
	for i, c := range w.history {
		if i+1 < len(w.history) && w.history[i+1].at.Before(from) {
			continue
		}
		fmt.Fprintf(&b, "  %9.3fs %s: %s\n", c.at.Sub(w.began).Seconds(), c.what, c.weather)
	}
	return b.String()
}

// recentLog keeps the end of what a proxy says, and each line of it that must not be. It is an io.Writer.
type recentLog struct {
	mu   sync.Mutex
	text []byte
	bad  []string
}

// faults are words that no log of the proxy may have.
var faults = [][]byte{[]byte("DATA RACE"), []byte("panic: "), []byte("fatal error: "), []byte("[signal "), []byte(`"level":"ERROR"`), []byte(`"internal_error"`)}

const keptLog = 128 << 10

func (l *recentLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, f := range faults {
		if bytes.Contains(p, f) {
			l.bad = append(l.bad, string(p[:min(len(p), 8000)]))
			break
		}
	}
	l.text = append(l.text, p...)
	if len(l.text) > 2*keptLog {
		l.text = append([]byte(nil), l.text[len(l.text)-keptLog:]...)
	}
	return len(p), nil
}

// faulty returns what must not be.
func (l *recentLog) faulty() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.bad, "\n")
}

// about returns the lines that have one of the words, and the last lines of all.
func (l *recentLog) about(words ...string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	lines := strings.Split(string(l.text), "\n")
	var b strings.Builder
	for i, line := range lines {
		ours := i >= len(lines)-5
		for _, w := range words {
			ours = ours || w != "" && strings.Contains(line, w)
		}
		if ours {
			fmt.Fprintf(&b, "  %s\n", line)
		}
	}
	return b.String()
}
