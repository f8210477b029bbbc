package daemon

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/stack/testkit"
)

func TestProgramEnv(t *testing.T) {
	in := []string{"PATH=/bin", "http_proxy=x", "ALL_PROXY=x", "No_Proxy=x", "VIASOCKS_PROXY=socks5://u:p@h", "PROXY=kept", "odd"}
	if got, want := programEnv(in, false), []string{"PATH=/bin", "PROXY=kept", "odd"}; !reflect.DeepEqual(got, want) {
		t.Errorf("%q", got)
	}
	if got, want := programEnv(in, true), []string{"PATH=/bin", "http_proxy=x", "ALL_PROXY=x", "No_Proxy=x", "PROXY=kept",
		"odd"}; !reflect.DeepEqual(
		got,
		want,
	) {
		t.Errorf("%q", got)
	}
	if got := programEnv([]string{"VIASOCKS_X=1"}, false); got == nil {
		t.Error("nil would hand over the whole environment")
	}
}

func TestBeyondStub(t *testing.T) {
	list := filepath.Join(t.TempDir(), "resolv.conf")
	for _, tt := range []struct{ file, address, want string }{
		{"nameserver 10.0.0.1\n", "127.0.0.53:53", "10.0.0.1:53"},
		{"# x\nsearch y\nnameserver 127.0.0.1\nnameserver fd00::1\n", "127.0.0.54:53", "[fd00::1]:53"},
		{"nameserver 10.0.0.1\n", "192.168.1.1:53", "192.168.1.1:53"},
		{"nameserver nonsense\n", "127.0.0.53:53", "127.0.0.53:53"},
	} {
		if err := os.WriteFile(list, []byte(tt.file), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := beyondStub(tt.address, list); got != tt.want {
			t.Errorf("%q: %s asks %s, want %s", tt.file, tt.address, got, tt.want)
		}
	}
	if got := beyondStub("127.0.0.53:53", list+".no"); got != "127.0.0.53:53" {
		t.Error(got)
	}
}

func TestLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	for range 2 {
		e, err := newEnv(parse(t, "--proxy", "socks5://h", "--log-file", path), os.Stderr)
		if err != nil {
			t.Fatal(err)
		}
		e.log.Info("said")
		e.log.Debug("not said")
		e.close()
	}
	b, err := os.ReadFile(path)
	if err != nil || strings.Count(string(b), "msg=said") != 2 || bytes.Contains(b, []byte("not said")) {
		t.Errorf("%s, %v", b, err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm()&0o077 != 0 {
		t.Errorf("the log is not its owner's alone: %v, %v", info.Mode(), err)
	}
	_, err = newEnv(&config.Config{LogFile: "/does/not/exist"}, os.Stderr)
	if err == nil || err.Error() != "cannot log to /does/not/exist: no such file or directory" {
		t.Error(err)
	}
}

// A pipe that nobody reads is an error, and not waited for.
func TestLogToPipe(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	want := "cannot log to " + path + ": nobody reads from this pipe: start its reader first"
	if _, err := newEnv(&config.Config{LogFile: path}, os.Stderr); err == nil || err.Error() != want {
		t.Error(err)
	}
	r, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	e, err := newEnv(&config.Config{LogFile: path}, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	e.log.Info("said")
	e.close()
	b := make([]byte, 100)
	if n, err := r.Read(b); err != nil || !bytes.Contains(b[:n], []byte("msg=said")) {
		t.Errorf("%q, %v", b[:n], err)
	}
}

func TestStartContext(t *testing.T) {
	testkit.CheckLeaks(t)
	signals := make(chan os.Signal, 1)
	ctx, cancel := startContext(signals)
	signals <- syscall.SIGTERM
	select {
	case <-ctx.Done():
	case <-time.After(testkit.Patience):
		t.Error("the signal does not end it")
	}
	if err := cancel(); err == nil {
		t.Error("the signal is forgotten")
	}
	_, cancel = startContext(signals)
	if err := cancel(); err != nil {
		t.Error(err)
	}
	for range 1000 { // the signal comes at the same moment as cancel, before or after it was taken
		_, cancel = startContext(signals)
		signals <- syscall.SIGTERM
		if err := cancel(); err == nil {
			t.Fatal("a signal is lost")
		}
	}
}

// The log may be a terminal: what others named is quoted in it.
func TestLogIsPlain(t *testing.T) {
	e := &env{}
	var b strings.Builder
	e.logTo(&b)
	const evil = "x\x1b[2J\u009b31m\u202e\n"
	e.log.Warn("said "+evil, "name", evil, "err", errors.New(evil), evil, 1)
	for _, r := range strings.TrimSuffix(b.String(), "\n") {
		if !strconv.IsPrint(r) {
			t.Errorf("%q stands raw in %q", r, b.String())
		}
	}
}
