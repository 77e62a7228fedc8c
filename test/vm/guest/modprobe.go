// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/pillionproxy/pillion/test/vm/kernel"
	"github.com/pillionproxy/pillion/test/vm/wire"
	"golang.org/x/sys/unix"
)

// modprobe loads the modules that the kernel or a program asks for by name or alias. It knows no option that matters.
func modprobe(args []string) error {
	var names []string
	for _, arg := range args {
		if !strings.HasPrefix(arg, "-") {
			names = append(names, arg)
		}
	}
	return load(names...)
}

// load loads modules and what they need. One that is part of the kernel, or that there is not, is left out: what a kernel
// lacks is for the tests to find out.
func load(names ...string) error {
	b, err := os.ReadFile(filepath.Join(wire.ModuleDir, wire.ModuleIndex))
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range kernel.ParseIndex(string(b)).Order(names...) {
		if err := insert(m); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func insert(name string) error {
	f, err := os.Open(filepath.Join(wire.ModuleDir, name+".ko"))
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load module %s: %w", name, err)
	}
	return nil
}
