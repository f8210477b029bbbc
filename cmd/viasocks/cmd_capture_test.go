package main

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// dissected are the packets of a capture as tshark sees them: direction, length of the payload, flags, comment.
func dissected(t *testing.T, file string) (lines []string) {
	t.Helper()
	cmd := exec.Command(lookPath(t, "tshark"), "-r", file, "-T", "fields", "-e", "tcp.dstport", "-e", "tcp.len", "-e",
		"tcp.flags.str", "-e", "frame.comment")
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("tshark: %v\n%s", err, &stderr)
	}
	return strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
}

// startCapture starts a capture with the runtime directory xdg.
func startCapture(t *testing.T, xdg string, args ...string) (c *exec.Cmd, stderr *bytes.Buffer) {
	t.Helper()
	c = viasocks(append([]string{"capture"}, args...)...)
	c.Env = append(c.Env, "XDG_RUNTIME_DIR="+xdg)
	stderr = &bytes.Buffer{}
	c.Stderr = stderr
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Process.Kill() })
	return c, stderr
}

// tellOfConnection wants among the packets the SYN of a connection, with its program, and the six bytes that the program said.
func tellOfConnection(t *testing.T, packets []string, program string) {
	t.Helper()
	if !slices.ContainsFunc(packets, func(p string) bool {
		return strings.HasPrefix(p, "80\t0\t") && strings.Contains(p, "S") &&
			strings.Contains(p, ": tcp to 203.0.113.9:80, program "+program) &&
			strings.Contains(p, "upstream proxy, rule default, ")
	}) {
		t.Errorf("no connection begins with a SYN that tells of it:\n%s", strings.Join(packets, "\n"))
	}
	up := 0
	for _, p := range packets {
		if strings.HasPrefix(p, "80\t6\t") {
			up++
		}
	}
	if up == 0 {
		t.Errorf("nobody says hello:\n%s", strings.Join(packets, "\n"))
	}
}

// endsAfterTwo has a program connect, to which in is a pipe, until a capture of two packets has ended.
func endsAfterTwo(t *testing.T, c *exec.Cmd, stderr *bytes.Buffer, in io.Writer) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- c.Wait() }()
	testkit.Eventually(t, "the end after two packets", func() bool {
		_, _ = io.WriteString(in, "go\n")
		select {
		case err := <-done:
			return err == nil
		case <-time.After(50 * time.Millisecond):
			return false
		}
	})
	if stderr.String() != "2 packets\n" {
		t.Errorf("got %s", stderr)
	}
}

// capture writes what a program under run and viasocks say to each other: SYN and FIN of both, the bytes, the program and the
// end.
func TestCaptureRun(t *testing.T) {
	bash := lookPath(t, "bash")
	s := carrying(t)
	needNamespaces(t, s)
	xdg := t.TempDir()
	script := "echo up; while read x; do exec 3<>/dev/tcp/203.0.113.9/80; echo hello >&3; read y <&3; exec 3>&-; done"
	cmd, in, end := instanceOf(t, xdg, s.URL(), bash, script)
	pid := strconv.Itoa(cmd.Process.Pid)
	file := filepath.Join(t.TempDir(), "c.pcapng")

	capture := func(args ...string) (c *exec.Cmd, stderr *bytes.Buffer) {
		return startCapture(t, xdg, append([]string{"--pid", pid}, args...)...)
	}
	c, stderr := capture("--program", "bash", "--destination", "203.0.113.9", file)
	testkit.Eventually(t, "the file to begin", func() bool { info, err := os.Stat(file); return err == nil && info.Size() > 0 })
	if info, _ := os.Stat(file); info.Mode().Perm() != 0o600 {
		t.Errorf("its mode is %v", info.Mode())
	}
	if got := asked(t, xdg, "capture", "--pid", pid,
		"-"); got != "exit 1\n--- stdout\n--- stderr\nviasocks: cannot capture: another capture is under way\n" {
		t.Error(got)
	}
	// A packet whose program is not known within 100 ms is not written. A machine that stalls loses the first ones of some.
	testkit.Eventually(t, "the comments on the end of connections", func() bool {
		_, _ = io.WriteString(in, "go\n")
		testkit.Pace(150 * time.Millisecond) // packets wait for 100 ms until they are written
		b, err := os.ReadFile(file)
		return err == nil && bytes.Count(b, []byte("closed, 6 bytes up, 6 down")) >= 3 && bytes.Contains(b, []byte("hello\n"))
	})
	_ = c.Process.Signal(syscall.SIGINT)
	if err := c.Wait(); err != nil || !strings.HasSuffix(stderr.String(), " packets\n") {
		t.Errorf("%v: %s", err, stderr)
	}
	packets := dissected(t, file)
	tellOfConnection(t, packets, bash)
	if n, _, _ := strings.Cut(stderr.String(), " "); n != strconv.Itoa(len(packets)) {
		t.Errorf("%q, tshark sees %d", stderr, len(packets))
	}

	// Limits, to a pipe.
	c, stderr = capture("--count", "2", "--time", "1m", "/dev/stdout")
	endsAfterTwo(t, c, stderr, in)
	end()
	gone := filepath.Join(t.TempDir(), "none")
	if got := asked(t, xdg, "capture", "--pid", pid, gone); !strings.HasPrefix(got,
		"exit 1\n--- stdout\n--- stderr\nviasocks: cannot ") {
		t.Error(got)
	}
	if _, err := os.Stat(gone); err == nil {
		t.Error("a file was made for nothing")
	}
}

func TestCaptureUsage(t *testing.T) {
	for args, want := range map[string]string{
		"":             "cannot capture: no file was given",
		"a b":          `cannot use "b": unexpected argument`,
		"--count 0 a":  "must be a number from 1",
		"--time 25h a": "must be from 1ms to 24h",
		"--foo a":      "cannot use --foo: there is no such option",
	} {
		got := result(t, viasocks(append([]string{"capture"}, strings.Fields(args)...)...))
		if !strings.HasPrefix(got, "exit 2\n") || !strings.Contains(got, want) {
			t.Errorf("%q: %s", args, got)
		}
	}
}
