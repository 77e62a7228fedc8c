// SPDX-License-Identifier: Apache-2.0

// Package listen holds the proxy's listening sockets and the connections that come from them.
//
// What always holds: the local address of a connection that a listener hands over is the address that its client meant,
// either because the capture gave the packet to a transparent listener unchanged, or because connection tracking
// remembers what a redirection rewrote; who meant a listener itself is known as such (Listener.At); a socket of ours
// carries no packet mark that was not the app's; and every connection is born with SO_LINGER{1,0}, so that a proxy that
// dies by whatever cause is seen by both ends as a reset, never as a clean end. Only Conn.Close, called when both
// directions have ended, takes that away.
package listen
