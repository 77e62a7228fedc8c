// SPDX-License-Identifier: Apache-2.0

package loop_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pillionproxy/pillion/proxy/loop"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/net/nettest"
)

// TestNetConnConforms: it is what package net says of a connection, for goroutines within Offload.
func TestNetConnConforms(t *testing.T) {
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		l := newLab(t, loop.Config{Loops: 2})
		ready, release, released := make(chan net.Conn), make(chan struct{}), make(chan struct{})
		a := l.listen(func(c *loop.Conn) {
			c.Start(func(c *loop.Conn) {
				n := c.NetConn()
				n.Offload(func(context.Context) {
					ready <- n
					<-release
				})
				_ = n.Close()
				close(released)
			})
		}, nil)
		c1 = dial(t, a)
		_ = c1.SetDeadline(time.Time{})
		used := &userCount{Conn: <-ready}
		return c1, used, func() {
			_ = c1.Close()
			_ = used.Close()
			used.end()
			close(release)
			<-released
		}, nil
	})
}

// userCount keeps those off who use a connection after the test: some of the goroutines of nettest do.
type userCount struct {
	net.Conn
	mu    sync.RWMutex
	ended bool
}

func (c *userCount) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
}

func (c *userCount) use(f func()) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if !c.ended {
		f()
	}
}

func (c *userCount) Read(p []byte) (n int, err error) {
	err = net.ErrClosed
	c.use(func() { n, err = c.Conn.Read(p) })
	return n, err
}

func (c *userCount) Write(p []byte) (n int, err error) {
	err = net.ErrClosed
	c.use(func() { n, err = c.Conn.Write(p) })
	return n, err
}

// TestTLS: crypto/tls runs unchanged, on the loop and, for the handshake, away from it.
func TestTLS(t *testing.T) {
	cfg := &tls.Config{Certificates: []tls.Certificate{certificate(t)}, MinVersion: tls.VersionTLS13}
	for _, name := range []string{"on the loop", "handshake away"} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, loop.Config{Loops: 2})
			a := l.serve(func(c *loop.Conn) {
				n := c.NetConn()
				server := tls.Server(n, cfg)
				if name == "handshake away" {
					n.Offload(func(ctx context.Context) {
						if err := server.HandshakeContext(ctx); err != nil {
							t.Error(err)
						}
					})
				}
				_, err := io.Copy(server, server)
				if err != nil {
					t.Error(err)
				}
				if err := server.Close(); err != nil {
					t.Error(err)
				}
			})
			done := make(chan error)
			const clients = 20
			for range clients {
				c := tls.Client(dial(t, a), &tls.Config{InsecureSkipVerify: true})
				go func() { done <- talk(c) }()
			}
			for range clients {
				if err := <-done; err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// talk makes exchanges of several sizes, ends its stream, and wants the peer to do so.
func talk(c *tls.Conn) error {
	for i := range 50 {
		if err := ping(c, strings.Repeat("hello over TLS ", 1+i*i)); err != nil {
			return err
		}
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	rest, err := io.ReadAll(c)
	if len(rest) > 0 {
		return errors.New("more than was sent")
	}
	return err
}

func certificate(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "x"}, DNSNames: []string{"x"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// TestHTTP2Framer: a server of HTTP/2 that is written with it runs unchanged, and net/http's client is content with it.
func TestHTTP2Framer(t *testing.T) {
	l := newLab(t, loop.Config{Loops: 2})
	a := l.serve(func(c *loop.Conn) {
		defer c.Close()
		if err := serveHTTP2(c.NetConn()); err != io.EOF && !errors.Is(err, net.ErrClosed) { // closed: by the end of the test
			t.Error(err)
		}
	})
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: protocols}
	defer transport.CloseIdleConnections()
	client := http.Client{Transport: transport}
	done := make(chan error)
	const requests = 100
	for range requests {
		go func() { done <- get(&client, "http://"+a+"/") }()
	}
	for range requests {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func get(client *http.Client, url string) error {
	r, err := client.Get(url)
	if err != nil {
		return err
	}
	defer func() { _ = r.Body.Close() }()
	body, err := io.ReadAll(r.Body)
	if err == nil && (r.StatusCode != http.StatusOK || string(body) != "hello") {
		return errors.New(r.Status + " " + string(body))
	}
	return err
}

// serveHTTP2 says hello to each request.
func serveHTTP2(c net.Conn) error {
	preface := make([]byte, len(http2.ClientPreface))
	if _, err := io.ReadFull(c, preface); err != nil {
		return err
	}
	w := bufio.NewWriter(c)
	f := http2.NewFramer(w, bufio.NewReader(c))
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if err := errors.Join(f.WriteSettings(), w.Flush()); err != nil {
		return err
	}
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			return err
		}
		switch frame := frame.(type) {
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				err = f.WriteSettingsAck()
			}
		case *http2.PingFrame:
			err = f.WritePing(true, frame.Data)
		case *http2.MetaHeadersFrame:
			const ok = 0x88 // ":status: 200", by its index in the static table (RFC 7541, appendix A)
			err = errors.Join(
				f.WriteHeaders(http2.HeadersFrameParam{StreamID: frame.StreamID, BlockFragment: []byte{ok}, EndHeaders: true}),
				f.WriteData(frame.StreamID, true, []byte("hello")))
		}
		if err := errors.Join(err, w.Flush()); err != nil {
			return err
		}
	}
}
