// SPDX-License-Identifier: Apache-2.0

package bootstrap

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/pillionproxy/pillion/config"
)

// exceptSession leaves the port alone by which whoever installs the capture is logged in: a packet filter knows no
// difference between sshd's listener and the app's, and a proxy that is not there yet would lock the door.
func exceptSession(o Options) (config.Selection, error) {
	s := o.Policy.Selection
	port, ok := sessionPort()
	if !ok || !s.InboundPorts.LetsIn(func(r config.PortRange) bool { return r.Contains(port) }) {
		return s, nil
	}
	if slices.ContainsFunc(s.InboundPorts.Include, func(r config.PortRange) bool { return r.First == port && r.Last == port }) {
		return s, nil // asked for by name
	}
	if o.Log != nil {
		o.Log.Info("the port by which you are logged in is left alone; name it with --include-inbound-ports to capture it", "port", port)
	}
	s.InboundPorts.Exclude = append(slices.Clone(s.InboundPorts.Exclude), config.PortRange{First: port, Last: port})
	return s, nil
}

// sessionPort is the port of the SSH server through which this process, or one above it, was started: sudo takes the
// variable out of the environment.
func sessionPort() (uint16, bool) {
	for pid := os.Getpid(); pid > 1; pid = parentOf(pid) {
		env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		if err != nil {
			continue // not ours to read
		}
		for _, v := range strings.Split(string(env), "\x00") {
			// SSH_CONNECTION: client address, client port, server address, server port (ssh(1))
			if value, ok := strings.CutPrefix(v, "SSH_CONNECTION="); ok {
				fields := strings.Fields(value)
				if len(fields) == 4 {
					if port, err := strconv.ParseUint(fields[3], 10, 16); err == nil {
						return uint16(port), true
					}
				}
			}
		}
	}
	return 0, false
}

// parentOf is the parent of a process, 0 if it cannot be told.
func parentOf(pid int) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	stat := string(b)
	fields := strings.Fields(stat[strings.LastIndex(stat, ")")+1:]) // behind the name, which may contain anything
	if len(fields) < 2 {
		return 0
	}
	parent, _ := strconv.Atoi(fields[1])
	return parent
}
