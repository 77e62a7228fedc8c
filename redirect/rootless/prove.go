// SPDX-License-Identifier: Apache-2.0

package rootless

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
)

// proofTime is generous: nothing leaves the loopback device.
const proofTime = 5 * time.Second

// discard is a port at which nobody is asked for anything (RFC 863).
const discard = 9

// Prove connects to where the plan leads, once in each family, and accepts at the listener that it is to come to: an IPv4 one,
// then an IPv6 one if there is one. Nothing else may be accepting there yet.
func (p Plan) Prove(ctx context.Context, listeners []*os.File) error {
	families := []redirect.Family{redirect.IPv4, redirect.IPv6}
	for i, f := range listeners {
		for _, r := range p.Routes {
			if family(r.Source) != families[i] {
				continue
			}
			if err := prove(ctx, f, r); err != nil {
				return &config.Fault{
					Err:  fmt.Errorf("the capture of the command's namespace does not take a connection from %s to %s: %w", r.Source, r.To, err),
					Hint: "this should not happen on any kernel: please report it, with `pillion run --backend rootless --dry-run -- true` and `uname -r`",
					Exit: config.ExitFailure,
				}
			}
			break
		}
	}
	return nil
}

func prove(ctx context.Context, listener *os.File, r Destination) error {
	l, err := net.FileListener(listener)
	if err != nil {
		return err
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(ctx, proofTime)
	defer cancel()
	to := netip.AddrPortFrom(inside(r.To), discard)
	d := net.Dialer{}
	d.SetMultipathTCP(false)
	c, err := d.DialContext(ctx, "tcp", to.String())
	if err != nil {
		return err
	}
	defer c.Close()
	if err := l.(*net.TCPListener).SetDeadline(time.Now().Add(proofTime)); err != nil {
		return err
	}
	accepted, err := l.Accept()
	if err != nil {
		return err
	}
	defer accepted.Close()
	if local, remote := accepted.LocalAddr().String(), accepted.RemoteAddr().String(); local != to.String() || remote != c.LocalAddr().String() {
		return fmt.Errorf("it arrived as %s from %s", local, remote)
	}
	if source := c.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap(); source != r.Source {
		return errors.New("its own address is " + source.String())
	}
	return nil
}
