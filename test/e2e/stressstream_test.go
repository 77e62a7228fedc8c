// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stressEnding is how a stream is to end.
type stressEnding string

const (
	endBoth        stressEnding = "both send, end and read"
	endClientFirst stressEnding = "the client ends first, then the server sends"
	endServerFirst stressEnding = "the server ends first, then the client sends"
	endClientReset stressEnding = "the client resets midway"
	endServerReset stressEnding = "the server resets midway"
	endClientDrops stressEnding = "the client closes with input unread"
)

// streamPlan is all that the two ends of a stream have to know. The client sends it first.
type streamPlan struct {
	ID          uint64
	Own, To     netip.AddrPort // the client's own address, and whom it means
	Server      int            // the number of the server that is meant
	Inbound     bool
	Up, Down    int64 // bytes to the server and to the client
	Cut         int64 // where the side that resets does so
	Ending      stressEnding
	Urgent      bool
	SlowClient  bool
	SlowServer  bool
	Small       bool   // many small writes
	Victim      int    // the process that will be killed, 0: none
	Description string // how the client connects
}

func (p streamPlan) String() string {
	return fmt.Sprintf("stream %d: %s to %s (server %d), %s; %d up, %d down, %s (at %d), urgent %v, slow client %v, slow server %v, small %v, victim %d",
		p.ID, p.Own, p.To, p.Server, p.Description, p.Up, p.Down, p.Ending, p.Cut, p.Urgent, p.SlowClient, p.SlowServer, p.Small, p.Victim)
}

// contentSeed is that of one direction: no two streams, and no two directions, have the same content anywhere.
func (p streamPlan) contentSeed(up bool) uint64 {
	s := p.ID << 1
	if up {
		s |= 1
	}
	return mix(s)
}

// mix is the finaliser of splitmix64.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// content writes what belongs at the offset of a stream: each byte depends on where it is.
func content(b []byte, seed uint64, offset int64) {
	var word [8]byte
	for len(b) > 0 {
		binary.LittleEndian.PutUint64(word[:], mix(seed+uint64(offset/8)))
		n := copy(b, word[offset%8:])
		b, offset = b[n:], offset+int64(n)
	}
}

// streamSide is one end of a stream under way. Its counts are read by the watch.
type streamSide struct {
	plan  streamPlan
	name  string
	begun time.Time
	c     *net.TCPConn
	tick  func() time.Duration // the time that counts
	rand  *rand.Rand           // of the sender alone

	mu       sync.Mutex
	progress time.Duration
	doing    string
	sent     int64
	received int64
}

func (s *streamSide) note(doing string, sent, received int) {
	now := s.tick()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.progress = now
	if doing != "" {
		s.doing = doing
	}
	s.sent += int64(sent)
	s.received += int64(received)
}

func (s *streamSide) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return fmt.Sprintf("the %s of %s\n  %s; sent %d, received %d, last progress at %s of the proxy's time", s.name, s.plan, s.doing, s.sent, s.received, s.progress)
}

// sideResult is how a stream ended at one side.
type sideResult struct {
	sendErr, recvErr error // recvErr is io.EOF at the end of the stream
}

// errContent is a byte in the wrong place: never allowed.
var errContent = errors.New("wrong content")

// run plays one side to its end, and closes the connection.
func (s *streamSide) run(client bool) (r sideResult) {
	defer s.c.Close()
	p := s.plan
	out, in, slow := p.Up, p.Down, p.SlowClient
	first, resets := p.Ending == endClientFirst, p.Ending == endClientReset
	second := p.Ending == endServerFirst
	if !client {
		out, in, slow = p.Down, p.Up, p.SlowServer
		first, second = second, first
		resets = p.Ending == endServerReset
	}
	send := func() {
		r.sendErr = s.send(out, p.contentSeed(client))
		if r.sendErr == nil {
			r.sendErr = s.c.CloseWrite()
		}
	}
	receive := func(limit int64) { r.recvErr = s.receive(limit, p.contentSeed(!client), slow) }
	switch {
	case resets:
		var reading sync.WaitGroup
		reading.Go(func() { receive(-1) })
		r.sendErr = s.send(p.Cut, p.contentSeed(client))
		s.note("resetting", 0, 0)
		_ = s.c.SetLinger(0)
		s.c.Close()
		reading.Wait()
	case client && p.Ending == endClientDrops:
		if r.sendErr = s.send(out, p.contentSeed(client)); r.sendErr == nil {
			receive(p.Cut)
		}
	case first:
		send()
		receive(-1)
	case second:
		receive(-1)
		if errors.Is(r.recvErr, io.EOF) {
			send()
		}
	default:
		var sending sync.WaitGroup
		sending.Go(send)
		receive(-1)
		sending.Wait()
	}
	switch {
	case errors.Is(r.recvErr, io.EOF) && errors.Is(r.sendErr, syscall.ECONNRESET):
		// The kernel tells of a reset once, and it has told the writer; whoever reads then sees an end. Had the stream been
		// ended, and only then reset, it would have told the writer EPIPE.
		r.recvErr = syscall.ECONNRESET
	case errors.Is(r.recvErr, io.EOF):
		s.mu.Lock()
		if s.received != in {
			r.recvErr = fmt.Errorf("%w: the end after %d of %d bytes", errShort, s.received, in)
		}
		s.mu.Unlock()
	}
	return r
}

// errShort is a stream that ended as if it were whole, and was not.
var errShort = errors.New("cut as if it were whole")

// send sends the first n bytes of the content.
func (s *streamSide) send(n int64, seed uint64) error {
	b := make([]byte, 64<<10)
	for at := int64(0); at < n; {
		size := int64(len(b))
		if s.plan.Small {
			size = 1 + s.rand.Int64N(300)
		}
		part := b[:min(size, n-at)]
		flags := 0
		if s.plan.Urgent && s.rand.IntN(4) == 0 {
			part, flags = part[:1], unix.MSG_OOB
		}
		content(part, seed, at)
		s.note("sending", 0, 0)
		var err error
		if flags != 0 {
			err = sendFlags(s.c, part, flags)
		} else {
			_, err = s.c.Write(part)
		}
		if err != nil {
			return err
		}
		s.note("", len(part), 0)
		at += int64(len(part))
	}
	return nil
}

// receive reads to the end, or limit bytes if that is not negative, and checks each byte.
func (s *streamSide) receive(limit int64, seed uint64, slow bool) error {
	b, want := make([]byte, 64<<10), make([]byte, 64<<10)
	from := io.Reader(s.c)
	if s.plan.Urgent {
		from = pastUrgent{s.c}
	}
	if slow {
		b = b[:4<<10]
	}
	for at := int64(0); limit < 0 || at < limit; {
		s.note("receiving", 0, 0)
		n, err := from.Read(b)
		content(want[:n], seed, at)
		if !bytes.Equal(b[:n], want[:n]) {
			i := 0
			for b[i] == want[i] {
				i++
			}
			_ = s.c.SetLinger(0)
			return fmt.Errorf("%w at byte %d: got % x, want % x", errContent, at+int64(i), b[i:min(n, i+16)], want[i:min(n, i+16)])
		}
		at += int64(n)
		s.note("", 0, n)
		if err != nil {
			return err
		}
		if slow {
			time.Sleep(time.Millisecond) // what makes it slow; nothing is measured by it
		}
	}
	return nil
}

// writePlan is the head of the client's stream.
func writePlan(c io.Writer, p streamPlan) error {
	text, err := json.Marshal(p)
	if err != nil {
		return err
	}
	_, err = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(text))), text...))
	return err
}

func readPlan(c io.Reader) (p streamPlan, err error) {
	var size [2]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return p, err
	}
	text := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(c, text); err != nil {
		return p, err
	}
	if err := json.Unmarshal(text, &p); err != nil {
		return p, fmt.Errorf("%w: %q: %w", errContent, text, err)
	}
	return p, nil
}

// isCut reports whether the error is one by which a connection is told that it was cut.
func isCut(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ENOTCONN)
}
