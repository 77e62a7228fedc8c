// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"time"

	"github.com/pillionproxy/pillion/config"
	"golang.org/x/sys/unix"
)

// Trial is one connection.
type Trial struct {
	Target   netip.AddrPort // of the decoy
	From     netip.Addr
	Ports    config.PortRange   // to dial from; none: any
	Mapped   bool               // by an IPv6 socket to an IPv4 address
	Mark     uint32             // of the dialling socket, beside the probe's own; non-zero also makes it transparent
	UID, GID uint32             // that make the dialling socket, if not 0
	Borrowed *Borrowed          // the proxy's listener; nil: nobody is expected there
	Before   func(uint16) error // called with the port that is dialled from, before the SYN
	// Namespace is the network namespace to connect from; nil: this one.
	Namespace *os.File
	// ByHandshake takes a handshake for a capture, if the decoy has not seen it soon after: of a proxy that runs, whose
	// own dial need not arrive.
	ByHandshake bool
}

// soon is how long the decoy has to see a connection whose handshake it made: it had it when the handshake was done.
const soon = time.Second

// probeTimeout bounds one connection. All of them stay on this host, so only a silent drop ever meets it.
const probeTimeout = 5 * time.Second

var (
	errNoSetuid = errors.New("set the user or group id of a socket: operation not permitted")
	// ErrSilence is a connection that nobody got.
	ErrSilence = errors.New("no answer: neither the proxy's listener nor the app's got the connection")
)

// listenDecoy listens at an address that need not be this host's.
func listenDecoy(ctx context.Context, a netip.AddrPort) (*net.TCPListener, error) {
	l, err := listen(ctx, a, func(fd int) error { return transparent(fd, a.Addr()) })
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", a, err)
	}
	return l, nil
}

// FreePort is a port of the address at which nobody listens.
func FreePort(ctx context.Context, a netip.Addr) (netip.AddrPort, error) {
	l, err := listenDecoy(ctx, netip.AddrPortFrom(a, 0))
	if err != nil {
		return netip.AddrPort{}, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).AddrPort(), nil
}

// CanListen reports whether a decoy could listen there.
func CanListen(ctx context.Context, a netip.AddrPort) bool {
	l, err := listenDecoy(ctx, a)
	if err == nil {
		l.Close()
	}
	return err == nil
}

// Try makes the connection and reports whether it was captured.
func (t Trial) Try(ctx context.Context) (captured bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	decoy, err := listenDecoy(ctx, t.Target)
	if err != nil {
		return false, err
	}
	defer decoy.Close()
	sock, from, err := dialSocket(t)
	if err != nil {
		return false, err
	}
	defer unix.Close(sock)
	// Closed by a reset: a connection from ::1 to a global address whose far end closes first is not ended by TIME_WAIT's
	// ACK, which Linux loses on the way; it would stay in LAST_ACK for minutes.
	if err := unix.SetsockoptLinger(sock, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
		return false, fmt.Errorf("set SO_LINGER: %w", err)
	}
	if t.Before != nil {
		if err := t.Before(from.Port()); err != nil {
			return false, err
		}
	}
	listeners := []*net.TCPListener{decoy}
	if t.Borrowed != nil && t.Borrowed.Free() {
		if err := t.Borrowed.Admit(from.Port()); err != nil {
			return false, err
		}
		listeners = append(listeners, t.Borrowed.l)
	}
	arrivals := accept(listeners)
	defer arrivals.Stop()
	if err := connect(ctx, sock, t.address(t.Target)); err != nil {
		if errors.Is(err, context.DeadlineExceeded) {
			return false, ErrSilence
		}
		return false, fmt.Errorf("connect %s to %s: %w", from, t.Target, err)
	}
	token := []byte(rand.Text())
	if _, err := unix.Write(sock, token); err != nil && !t.ByHandshake {
		return false, fmt.Errorf("send through the capture: %w", err)
	}
	var late <-chan time.Time
	if t.ByHandshake && t.Borrowed != nil && !t.Borrowed.Free() {
		late = time.After(soon)
	}
	select {
	case <-late:
		return true, nil
	case a := <-arrivals.C:
		defer a.conn.Close()
		return a.listener != decoy || a.from() != from, a.expect(ctx, token)
	case <-ctx.Done():
		return false, ErrSilence
	}
}

// dialSocket makes a bound, non-blocking socket for the trial.
func dialSocket(t Trial) (fd int, from netip.AddrPort, err error) {
	if fd, err = t.socket(); err != nil {
		return -1, from, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(t.Mark|config.ProbeMark)); err != nil {
		return -1, from, fmt.Errorf("set SO_MARK: %w", err)
	}
	if t.Mark != 0 {
		if err := transparent(fd, t.From); err != nil {
			return -1, from, err
		}
	}
	if err := t.bind(fd); err != nil {
		return -1, from, fmt.Errorf("bind to %s: %w", t.From, err)
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return -1, from, fmt.Errorf("getsockname: %w", err)
	}
	from = addrPort(sa)
	return fd, netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), nil
}

// address is the address as the socket of the trial has it.
func (t Trial) address(a netip.AddrPort) netip.AddrPort {
	if t.Mapped {
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr().As16()), a.Port())
	}
	return a
}

// bind takes a free port of the range, the last ones first: the proxy begins with the first ones.
func (t Trial) bind(fd int) error {
	for port := t.Ports.Last; ; port-- {
		err := unix.Bind(fd, sockaddr(t.address(netip.AddrPortFrom(t.From, port))))
		if !errors.Is(err, unix.EADDRINUSE) || port == t.Ports.First {
			return err
		}
	}
}

// socket makes the socket in the network namespace of the trial: there it stays.
func (t Trial) socket() (fd int, err error) {
	v6 := t.From.Is6() || t.Mapped
	if t.Namespace == nil {
		return socketAs(t.UID, t.GID, v6)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends
		if err = unix.Setns(int(t.Namespace.Fd()), unix.CLONE_NEWNET); err == nil {
			fd, err = socketAs(t.UID, t.GID, v6)
		}
	}()
	<-done
	return fd, err
}

// socketAs makes a TCP socket whose maker is the user uid and the group gid, if they are not 0: by the real ids, which BPF
// sees, and by those of the file system, which packet filters see. They are the thread's own while it lasts; the effective
// ones, and with them every capability, stay.
func socketAs(uid, gid uint32, v6 bool) (int, error) {
	family := unix.AF_INET
	if v6 {
		family = unix.AF_INET6
	}
	for _, id := range []struct {
		real, file uintptr // system calls
		id         uint32
		was, wasFS int
	}{
		{unix.SYS_SETRESGID, unix.SYS_SETFSGID, gid, unix.Getgid(), unix.Getegid()},
		{unix.SYS_SETRESUID, unix.SYS_SETFSUID, uid, unix.Getuid(), unix.Geteuid()},
	} {
		if id.id == 0 {
			continue
		}
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := setThreadID(id.real, int(id.id)); err != nil {
			return -1, errNoSetuid
		}
		defer setThreadID(id.real, id.was)
		setThreadFileID(id.file, int(id.id))
		defer setThreadFileID(id.file, id.wasFS)
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	return fd, nil
}

// setThreadID sets the real user or group id of this thread alone; unix.Setresuid would set that of all.
func setThreadID(call uintptr, id int) error {
	keep := ^uintptr(0)
	if _, _, errno := unix.RawSyscall(call, uintptr(id), keep, keep); errno != 0 {
		return errno
	}
	return nil
}

// setThreadFileID sets the id that counts for files, among which sockets are; it reports no error (setfsuid(2)).
func setThreadFileID(call uintptr, id int) { _, _, _ = unix.RawSyscall(call, uintptr(id), 0, 0) }

// connect waits until the handshake is done.
func connect(ctx context.Context, fd int, to netip.AddrPort) error {
	err := unix.Connect(fd, sockaddr(to))
	for errors.Is(err, unix.EINPROGRESS) || errors.Is(err, unix.EINTR) {
		deadline, _ := ctx.Deadline()
		left := time.Until(deadline)
		if left <= 0 {
			return context.DeadlineExceeded
		}
		n, perr := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, int(left.Milliseconds())+1)
		switch {
		case errors.Is(perr, unix.EINTR):
			continue
		case perr != nil:
			return perr
		case n == 0:
			return context.DeadlineExceeded
		}
		soerr, gerr := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if gerr != nil {
			return gerr
		}
		if soerr != 0 {
			return unix.Errno(soerr)
		}
		return nil
	}
	return err
}

// arrival is a connection that one of the listeners got.
type arrival struct {
	listener *net.TCPListener
	conn     *net.TCPConn
}

func (a arrival) from() netip.AddrPort {
	ap := a.conn.RemoteAddr().(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}

// expect reads the token: the connection is the probe's, and its bytes come through.
func (a arrival) expect(ctx context.Context, token []byte) error {
	if deadline, ok := ctx.Deadline(); ok {
		a.conn.SetReadDeadline(deadline)
	}
	got := make([]byte, len(token))
	if _, err := io.ReadFull(a.conn, got); err != nil {
		return fmt.Errorf("the connection arrived, but not what was sent through it: %w", err)
	}
	if string(got) != string(token) {
		return errors.New("a foreign connection arrived in place of the probe's")
	}
	return nil
}

// acceptor accepts on several listeners; the first arrival is what counts.
type acceptor struct {
	C    chan arrival
	done []chan struct{}
	ls   []*net.TCPListener
}

func accept(listeners []*net.TCPListener) *acceptor {
	a := &acceptor{C: make(chan arrival, len(listeners)), ls: listeners}
	for _, l := range listeners {
		done := make(chan struct{})
		a.done = append(a.done, done)
		l.SetDeadline(time.Time{})
		go a.acceptOne(l, done)
	}
	return a
}

func (a *acceptor) acceptOne(l *net.TCPListener, done chan struct{}) {
	defer close(done)
	if c, err := l.AcceptTCP(); err == nil {
		a.C <- arrival{l, c}
	}
}

// Stop ends the accepting and waits for it; connections that nobody took are closed.
func (a *acceptor) Stop() {
	for i, l := range a.ls {
		l.SetDeadline(time.Unix(1, 0))
		<-a.done[i]
	}
	for {
		select {
		case late := <-a.C:
			late.conn.Close()
		default:
			return
		}
	}
}
