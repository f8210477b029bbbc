package e2e

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"
	"testing"

	"github.com/viasocks/viasocks/cmd/internal/harness"
)

const raceEnabled = harness.Race

const (
	envInside = "E2E_INSIDE" // set in the test process that is inside its namespaces: path of the viasocks binary
	envAgent  = "E2E_AGENT"  // set in the captured program: the unix socket to serve on
	envWhy    = "E2E_SKIP"   // why the tests are skipped

	envRetries    = "E2E_SYN_RETRIES" // the agent's tcp_syn_retries
	envFinTimeout = "E2E_FIN_TIMEOUT" // the agent's tcp_fin_timeout

	world4 = "203.0.113.1"
	world6 = "2001:db8::1"
	// A second address for what must not be the first.
	other4 = "203.0.113.2"
	other6 = "2001:db8::2"
)

var viasocks string // the viasocks under test

func TestMain(m *testing.M) {
	if path := os.Getenv(envAgent); path != "" {
		os.Exit(agentMain(path))
	}
	if to := os.Getenv(envFlood); to != "" {
		os.Exit(floodMain(to))
	}
	if viasocks = os.Getenv(envInside); viasocks != "" {
		if os.Getenv(envWhy) == "" { // else this is nobody's namespace but the host's
			if err := makeWorld(); err != nil {
				os.Setenv(envWhy, err.Error())
			}
		}
		flag.Parse()
		if err := flag.Set("test.parallel", strconv.Itoa(apartAtOnce)); err != nil {
			fmt.Fprintln(os.Stderr, "e2e:", err)
		}
		os.Exit(m.Run())
	}
	code, err := harness.Reenter("", envInside, envWhy, syscall.CLONE_NEWNET|syscall.CLONE_NEWNS)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

// makeWorld gives the namespace its addresses. Nothing here can reach anything outside.
func makeWorld() error {
	runtime.LockOSThread() // mounts and addresses belong to the process's namespaces; the lock is for clarity of errors only
	defer runtime.UnlockOSThread()
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("cannot make the mounts private: %w", err)
	}
	for _, args := range [][]string{
		{"link", "set", "lo", "up"},
		{"addr", "add", world4 + "/32", "dev", "lo"},
		{"addr", "add", other4 + "/32", "dev", "lo"},
		{"addr", "add", world6 + "/128", "dev", "lo", "nodad"},
		{"addr", "add", other6 + "/128", "dev", "lo", "nodad"},
	} {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("cannot make the world: ip %v: %w: %s", args, err, out)
		}
	}
	return harness.CheckTUN()
}

// needWorld skips a test where the namespaces could not be made.
func needWorld(t testing.TB) {
	t.Helper()
	if why := os.Getenv(envWhy); why != "" {
		t.Skip(why)
	}
}
