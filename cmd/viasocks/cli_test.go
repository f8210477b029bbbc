package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/daemon"
	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun/netns"
)

// TestMain is main when a test starts the test's own binary as viasocks.
func TestMain(m *testing.M) {
	netns.MainIfChild()
	daemon.MainIfGuardian()
	if os.Getenv("TEST_AS_VIASOCKS") != "" {
		os.Unsetenv("TEST_AS_VIASOCKS")
		os.Exit(dispatch(os.Args, os.Environ(), streams{os.Stdin, os.Stdout, os.Stderr}))
	}
	os.Exit(m.Run())
}

// viasocks makes a command that runs this binary as viasocks, without the proxy of whoever runs the test.
func viasocks(args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = "viasocks"
	cmd.Env = []string{"TEST_AS_VIASOCKS=1", "PATH=" + os.Getenv("PATH"), "GORACE=atexit_sleep_ms=0"}
	return cmd
}

// result is what a user sees: the exit status, and both outputs.
func result(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	var out, err bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &err
	cmd.WaitDelay = testkit.Patience
	if e := cmd.Start(); e != nil {
		t.Fatal(e)
	}
	hung := time.AfterFunc(6*testkit.Patience, func() { cmd.Process.Kill() })
	defer hung.Stop()
	_ = cmd.Wait() // the status tells
	return fmt.Sprintf("exit %d\n--- stdout\n%s--- stderr\n%s", cmd.ProcessState.ExitCode(), &out, &err)
}

var port = regexp.MustCompile(`127\.0\.0\.1:\d{5}`)

// golden compares with testdata/NAME, ports that the kernel chose left out.
func golden(t *testing.T, name, got string) {
	t.Helper()
	got = port.ReplaceAllString(got, "127.0.0.1:PORT")
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s: got\n%s\nwant\n%s(go test ./cmd/viasocks -update writes it)", name, got, want)
	}
}

// Every error is one line on standard error, nothing on standard output, and the right exit status.
func oneLine(t *testing.T, got string) {
	t.Helper()
	_, stderr, _ := strings.Cut(got, "--- stdout\n--- stderr\n")
	if strings.Count(stderr, "\n") != 1 || !strings.HasPrefix(stderr, "viasocks: ") {
		t.Errorf("not one line of error:\n%s", got)
	}
}

// An answer that can't be written is an error.
func TestOutputFull(t *testing.T) {
	for _, args := range []string{"help", "help up", "up --help", "version", "check --proxy socks5://h"} {
		full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
		if err != nil {
			t.Skip(err)
		}
		defer full.Close()
		var stderr strings.Builder
		cmd := viasocks(strings.Fields(args)...)
		cmd.Stdout, cmd.Stderr = full, &stderr
		_ = cmd.Run()
		if want := "viasocks: cannot write to /dev/stdout: no space left on device\n"; cmd.ProcessState.ExitCode() != exitNoStart ||
			stderr.String() != want {
			t.Errorf("%s: exit %d, %s", args, cmd.ProcessState.ExitCode(), &stderr)
		}
	}
}

func TestUsageErrors(t *testing.T) {
	var all strings.Builder
	for _, args := range []string{
		"walk", "dwon", "stop", "--prxy x run",
		"run", "run --prxy x", "run --mtu 9 p", "run --proxy ftp://h p", "run --proxy socks5://h",
		"run --tun x p", "up --proxy socks5://h word", "up --mark 0", "up --proxy=socks5://al:geheim@h:x",
		"up --config /does/not/exist", "run --proxy socks5://al@h --password-file /does/not/exist p",
		"up --keep-proxy-env", "check", "version now", "help walk", "help run up",
		"check --proxy socks5://h --rule allow",
	} {
		got := result(t, viasocks(strings.Fields(args)...))
		oneLine(t, got)
		if strings.Contains(got, "geheim") {
			t.Errorf("%s: shows the password", args)
		}
		fmt.Fprintf(&all, "$ viasocks %s\n%s\n", args, strings.Replace(got, "--- stdout\n--- stderr\n", "", 1))
	}
	golden(t, "usage_errors.txt", all.String())
}
