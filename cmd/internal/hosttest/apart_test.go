package hosttest

import (
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/viasocks/viasocks/cmd/internal/harness"
)

// turns are the turns of the tests that run apart. They use the processors for less than a tenth of the time that they take. The
// tests that are named here take half of that time.
var turns = harness.NewQueue(8,
	"TestClients", "TestLeak", "TestChoosingIsKilled", "TestRulesOfReach", "TestAttachKilled", "TestRestored",
	"TestDirectInKernelReloads", "TestChoices", "TestProgramIsKilled", "TestDefaultRoutes", "TestTakeoverKilled",
)

// apart runs the calling test beside others of its kind: its network namespaces, its /run and its process ids are then no
// concern of the others. See harness.Apart.
func apart(t *testing.T) bool {
	t.Helper()
	return turns.Apart(t, envWhy, syscall.CLONE_NEWNET|syscall.CLONE_NEWNS|syscall.CLONE_NEWPID)
}

// rootOfTheMachine skips a test that needs other users than root, where a user namespace has root alone.
func rootOfTheMachine(t *testing.T) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/uid_map")
	if f := strings.Fields(string(b)); err != nil || len(f) != 3 || f[2] != "4294967295" {
		t.Skip("this needs root of the machine: a user namespace of one user has no other users")
	}
}
