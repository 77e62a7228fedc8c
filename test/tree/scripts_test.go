// SPDX-License-Identifier: Apache-2.0

package tree

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestScriptsNameWhatIsMissing: on a host without apt-get, a make target says by name what it cannot do without, and does
// nothing else.
func TestScriptsNameWhatIsMissing(t *testing.T) {
	bare := t.TempDir()
	for _, program := range []string{"bash", "dirname", "id", "tr"} {
		path, err := exec.LookPath(program)
		if err != nil {
			t.Skipf("no %s", program)
		}
		if err := os.Symlink(path, filepath.Join(bare, program)); err != nil {
			t.Fatal(err)
		}
	}
	for target, want := range map[string][]string{"demo-pods": {"podman", "conmon", "curl"}, "vm": {"qemu-system-x86"}, "lint": {"shellcheck"}} {
		cmd := exec.Command(filepath.Join(bare, "bash"), filepath.Join(tree, "scripts/deps.sh"), target)
		cmd.Env = []string{"PATH=" + bare}
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), `missing for "make `+target+`"`) || !strings.Contains(string(out), "no apt-get") {
			t.Errorf("%s: %v\n%s", target, err, out)
		}
		for _, name := range want {
			if !strings.Contains(string(out), name) {
				t.Errorf("%s: %s is not named:\n%s", target, name, out)
			}
		}
	}
}
