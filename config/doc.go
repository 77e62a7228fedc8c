// SPDX-License-Identifier: Apache-2.0

// Package config holds the one typed configuration of both halves of Pillion, the capture and the proxy, and the few
// numbers in which the two meet: ports, packet marks, routing tables and rule priorities.
//
// What always holds: a value that passed Validate is complete and consistent; nothing in this package reads the outside
// world; and no number of the first kind is written anywhere else in the tree.
package config
