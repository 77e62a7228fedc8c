// SPDX-License-Identifier: Apache-2.0

package pod

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/pillionproxy/pillion/test/testnet"
)

// tree is the root of the repository; go test runs in the folder of the package.
const tree = "../.."

// pods is the store of all tests, and pillionPath the program on the node. Both are made by the first test that needs them.
var (
	pods        *store
	pillionPath string
	build       = sync.OnceValue(buildAll)
)

func buildAll() error {
	var err error
	if pods, err = newStore(); err != nil {
		return err
	}
	if archive := os.Getenv("PILLION_TEST_IMAGES"); archive != "" { // where there is no Go, as in the machines of test/vm
		pillionPath = os.Getenv("PILLION_TEST_BINARY")
		return pods.loadImages(archive)
	}
	pillionPath = filepath.Join(pods.dir, "pillion")
	compile := exec.Command("go", "build", "-o", pillionPath, "./cmd/pillion")
	compile.Dir = tree
	if out, err := compile.CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w\n%s", compile.Args, err, out)
	}
	return pods.buildImages(tree)
}

// nodeDecides are the tests that run under -short, as in the machines of test/vm, whose kernel, podman and cgroups are
// not those of the host.
var nodeDecides = []string{"TestPodsTalk", "TestContainersThatComeLater"}

func TestMain(m *testing.M) {
	testnet.Short = nodeDecides
	testnet.AgentMain()
	status := testnet.Main(m)
	if pods != nil {
		if err := pods.remove(); err != nil {
			fmt.Fprintln(os.Stderr, "left behind:", err)
			status = max(status, 1)
		}
	}
	os.Exit(status)
}
