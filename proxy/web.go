// SPDX-License-Identifier: Apache-2.0

package proxy

import "github.com/pillionproxy/pillion/proxy/admin"

// serveWeb serves the health and the admin address, those of them that there are, until stop is called, which waits for
// both to end.
func (s *Server) serveWeb() (stop func()) {
	var stops []func()
	if s.health != nil {
		stops = append(stops, admin.Serve(s.health, admin.Health(s.Ready, s.book.Metrics()), s.log))
	}
	if s.admin != nil {
		stops = append(stops, admin.Serve(s.admin, admin.Admin(s.Ready, s.book, s.book.Metrics()), s.log))
	}
	return func() {
		for _, stop := range stops {
			stop()
		}
	}
}
