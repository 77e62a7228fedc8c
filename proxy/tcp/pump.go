// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"io"

	"github.com/pillionproxy/pillion/proxy/loop"
)

const (
	// bulkBurst is the least that comes at once as long as it is bulk; what is less is as well copied.
	bulkBurst = 128 << 10
	// share is what one stream may pass on until others get their turn.
	share = 1 << 20
)

// pump is the handler of both connections of a pair: it passes on what has come, be it the end.
func pump(c *loop.Conn) {
	s := c.State.(*side)
	finished := false
	defer func() {
		if !finished { // it panics: the other side is to know
			s.relay.fail(&Error{Side: s.which, Err: errFault})
		}
	}()
	if err := s.pass(); err != nil {
		s.relay.fail(err)
	}
	finished = true
}

// pass passes on what there is, or a fair share of it.
func (s *side) pass() *Error {
	for {
		if s.bulk {
			again, err := s.splice()
			if err != nil || !again {
				return err
			}
		}
		again, err := s.copy()
		if err != nil || !again {
			return err
		}
	}
}

// splice passes on bulk without copying it. again: the rest, be it the end, is for copy to receive.
func (s *side) splice() (again bool, _ *Error) {
	n, srcErr, dstErr := loop.Splice(s.other().conn, s.conn, share)
	s.count(n)
	switch {
	case dstErr != nil:
		return false, s.sending(dstErr)
	case srcErr == loop.ErrNoPipe:
		s.bulk = false
		return true, nil
	case srcErr != nil:
		return false, s.receiving(srcErr)
	case n >= share:
		return false, nil // we are called again
	}
	s.bulk = n >= bulkBurst
	return s.conn.Readable(), nil
}

// copy passes on what comes in pieces, until there is no more, or it turns out to be bulk: again.
func (s *side) copy() (again bool, _ *Error) {
	for full := 0; full < 2; {
		b := s.conn.Loop().Buffer()
		n, err := s.conn.TryRecv(b)
		if err == nil && n < len(b) && !s.conn.Urgent() && s.conn.Ending() { // so that the end goes with the data
			var more int
			more, err = s.conn.TryRecv(b[n:])
			n += more
		}
		if n > 0 {
			if n == len(b) {
				full++
			}
			if err := s.send(b, n, err == io.EOF); err != nil {
				return false, err
			}
		} else {
			s.conn.Loop().Release(b)
		}
		switch {
		case err == loop.ErrAgain:
			return false, nil
		case err == io.EOF:
			return false, s.end()
		case err != nil:
			return false, s.receiving(err)
		}
		if n > 0 && !s.conn.Readable() {
			return false, nil
		}
	}
	s.bulk = true
	return true, nil
}

// send passes on the first n bytes of a buffer, which it gives back.
func (s *side) send(b []byte, n int, last bool) *Error {
	to := s.other().conn
	var err error
	if s.conn.Urgent() {
		n, err = to.SendUrgent(b[:n])
		s.conn.Loop().Release(b)
	} else {
		n, err = to.SendBuffer(b, n, last)
	}
	s.count(n)
	if err != nil {
		return s.sending(err)
	}
	return nil
}

func (s *side) count(n int) {
	if n > 0 {
		s.passed.Add(uint64(n))
		s.relay.touch()
	}
}

// end passes on the end of the stream. Nobody reads this side any more, but it may still reset the connection while the other stream
// goes on: then we are called again. With the second end of a pair both are closed, which passes it on too.
func (s *side) end() *Error {
	if !s.other().ended {
		if err := s.other().conn.CloseWrite(); err != nil {
			return s.sending(err)
		}
	}
	s.ended = true
	s.relay.finish()
	return nil
}
