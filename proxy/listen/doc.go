// SPDX-License-Identifier: Apache-2.0

// Package listen holds the proxy's listening sockets and the connections that come from them.
//
// What always holds: the local address of an accepted connection is the address that its client meant, because the
// listener is transparent and the capture hands it the packet unchanged; nothing is ever listened to but 127.0.0.1 and
// ::1; a socket of ours carries no packet mark that was not the app's; and every connection is born with SO_LINGER{1,0},
// so that a proxy that dies by whatever cause is seen by both ends as a reset, never as a clean end. Only Conn.Close,
// called when both directions have ended, takes that away.
package listen
