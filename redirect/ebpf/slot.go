// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/pillionproxy/pillion/config"
	"github.com/pillionproxy/pillion/redirect"
)

// A Held capture leaves no note on the host; while its process lives, an abstract Unix address tells the others that its
// slot is taken and what the sysctls were: @pillion/slot/7/0,0,0
const slotPrefix = "@pillion/slot/"

// claim takes the slot until the closer is called or the process ends. The caller holds the Lock.
func claim(slot config.Slot, found []string) (net.Listener, error) {
	name := fmt.Sprintf("%s%d/%s", slotPrefix, slot, strings.Join(found, ","))
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("claim slot %d: %w", slot, err)
	}
	return l, nil
}

// claimed lists the slots that live processes hold, with the sysctls that each found.
func claimed() (map[config.Slot][]string, error) {
	f, err := os.Open("/proc/thread-self/net/unix")
	if err != nil {
		return nil, fmt.Errorf("list held slots: %w", err)
	}
	defer f.Close()
	slots := make(map[config.Slot][]string)
	for lines := bufio.NewScanner(f); lines.Scan(); {
		_, name, ok := strings.Cut(lines.Text(), slotPrefix)
		if !ok {
			continue
		}
		var slot config.Slot
		number, values, _ := strings.Cut(name, "/")
		if _, err := fmt.Sscanf(number, "%d", &slot); err == nil && slot < config.Slots {
			slots[slot] = strings.Split(strings.TrimRight(values, "\x00@"), ",")
		}
	}
	return slots, nil
}

// FreeSlot is the highest slot that nobody uses. The caller holds the redirect.Lock until it has claimed it.
func FreeSlot() (config.Slot, error) {
	used, err := usedSlots()
	if err != nil {
		return 0, err
	}
	for s := config.Slot(config.Slots - 1); s > 0; s-- {
		if _, ok := used[s]; !ok {
			return s, nil
		}
	}
	return 0, &config.Fault{
		Err:  fmt.Errorf("all %d slots for commands are in use in this network namespace", config.Slots-1),
		Hint: "wait for one of the running `pillion run` to end; `pillion status` lists them",
	}
}

// usedSlots are the slots in use, by a note or by a process, with the sysctls found by each.
func usedSlots() (map[config.Slot][]string, error) {
	used, err := claimed()
	if err != nil {
		return nil, err
	}
	ours, _, err := listFilters()
	if err != nil {
		return nil, err
	}
	for _, f := range ours {
		if _, ok := used[f.Note.Slot]; !ok && f.Note.Plan != heldPlan {
			used[f.Note.Slot] = f.Note.Sysctls
		}
	}
	return used, nil
}

// foundSysctls are the values from before any capture: from the notes of those that are there, else as they read now.
func foundSysctls() ([]string, error) {
	used, err := usedSlots()
	if err != nil {
		return nil, err
	}
	for _, values := range used {
		if len(values) == len(sysctls) {
			return values, nil
		}
	}
	ours, _, err := listFilters() // those of killed processes too
	if err != nil {
		return nil, err
	}
	for _, f := range ours {
		if len(f.Note.Sysctls) == len(sysctls) {
			return f.Note.Sysctls, nil
		}
	}
	return redirect.ReadSysctls(sysctls), nil
}

// restoreUnlessUsed gives the sysctls back if no capture but that of the slot needs them.
func restoreUnlessUsed(slot config.Slot, found []string) error {
	used, err := usedSlots()
	if err != nil {
		return err
	}
	for s := range used {
		if s != slot {
			return nil
		}
	}
	return redirect.RestoreSysctls(sysctls, found)
}
