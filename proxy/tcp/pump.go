// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"io"

	"github.com/pillionproxy/pillion/proxy/loop"
)

const (
	// bulk is how many full buffers in a row are taken for bulk.
	bulk = 2
	// bulkBurst is the least that comes at once as long as it is bulk; what is less is as well copied.
	bulkBurst = 128 << 10
	// share is what one stream may pass on until others get their turn, as bulk or in pieces, of which there are no more than make as
	// much if they are full. In a turn in which it becomes bulk it passes on both.
	share  = 1 << 20
	pieces = share / loop.BufferSize
)

// pump is the handler of both connections of a pair: it passes on what has come, be it the end.
func pump(c *loop.Conn) {
	s := c.State.(*side)
	finished := false
	defer func() {
		if !finished { // it panics: the other side is to know
			s.relay.fail(&Error{Side: s.which, Err: ErrFault})
		}
	}()
	if err := s.pass(); err != nil {
		s.relay.fail(err)
	}
	finished = true
}

// pass passes on what there is, or its share of it; then we are called again.
func (s *side) pass() *Error {
	for range pieces {
		more, err := s.piece()
		if err != nil || !more {
			return err
		}
	}
	return nil
}

// piece passes on what comes at once. more: there may be more, or its end.
func (s *side) piece() (more bool, _ *Error) {
	if s.full < bulk {
		return s.copy()
	}
	n, srcErr, dstErr := loop.Splice(s.other().conn, s.conn, share)
	s.count(n)
	switch {
	case dstErr != nil:
		return false, s.sending(dstErr)
	case srcErr == loop.ErrNoPipe:
		s.full = 0
		return true, nil
	case srcErr != nil:
		return false, s.receiving(srcErr)
	case n >= share:
		return false, nil
	case s.conn.Readable() || n < bulkBurst: // something that splice cannot tell of; or it is bulk no more
		s.full = 0
	}
	return s.conn.Readable(), nil
}

// copy is piece by way of a buffer.
func (s *side) copy() (more bool, _ *Error) {
	b := s.conn.Loop().Buffer()
	n, err := s.conn.TryRecv(b)
	if err == nil && n < len(b) && !s.conn.Urgent() && s.conn.Ending() { // so that the end goes with the data
		var rest int
		rest, err = s.conn.TryRecv(b[n:])
		n += rest
	}
	if n == len(b) {
		s.full++
	} else {
		s.full = 0
	}
	if serr := s.send(b, n, err == io.EOF); serr != nil {
		return false, serr
	}
	switch {
	case err == loop.ErrAgain:
		return false, nil
	case err == io.EOF:
		return false, s.end()
	case err != nil:
		return false, s.receiving(err)
	}
	return s.conn.Readable(), nil
}

// send passes on the first n bytes of a buffer, maybe none, and gives it back.
func (s *side) send(b []byte, n int, last bool) *Error {
	to := s.other().conn
	var err error
	if n > 0 && s.conn.Urgent() {
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
