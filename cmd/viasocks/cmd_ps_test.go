package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// instance is a program under `run` with the runtime directory xdg, which ends when its standard input does.
func instance(t *testing.T, xdg, url string) (cmd *exec.Cmd, end func()) {
	t.Helper()
	cmd, _, end = instanceOf(t, xdg, url, "sh", "echo up; read x")
	return cmd, end
}

// instanceOf is instance with a shell and a script of its own, which says up. in is its standard input.
func instanceOf(t *testing.T, xdg, url, shell, script string) (cmd *exec.Cmd, in io.WriteCloser, end func()) {
	t.Helper()
	cmd = viasocks("run", "--proxy", url, "--", shell, "-c", script)
	cmd.Env = append(cmd.Env, "XDG_RUNTIME_DIR="+xdg)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := false
	end = func() {
		if !ended {
			ended = true
			in.Close()
			_ = cmd.Wait()
		}
	}
	t.Cleanup(end)
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "up\n" {
		t.Fatalf("%q, %v", line, err)
	}
	return cmd, in, end
}

// asked is what a subcommand prints with the runtime directory xdg.
func asked(t *testing.T, xdg string, args ...string) string {
	t.Helper()
	cmd := viasocks(args...)
	cmd.Env = append(cmd.Env, "XDG_RUNTIME_DIR="+xdg)
	return result(t, cmd)
}

// ps lists what runs, status and flows ask the one that --pid names, and nothing is left behind, not even by one that was killed.
func TestPs(t *testing.T) {
	s := server(t)
	needNamespaces(t, s)
	xdg := t.TempDir()
	dir := []string{"--state-dir", t.TempDir() + "/none"} // of a viasocks that is not up
	a, endA := instance(t, xdg, strings.Replace(s.URL(), "://", "://al:geheim@", 1))
	b, _ := instance(t, xdg, s.URL())
	found := listed(t, xdg)
	for _, cmd := range []*exec.Cmd{a, b} {
		i := found[cmd.Process.Pid]
		if i.Mode != control.ModeRun || i.Program != "sh" || i.Proxy != s.URL() || i.State != control.Ready ||
			i.UID != os.Getuid() {
			t.Errorf("process %d: %+v", cmd.Process.Pid, found)
		}
	}
	if got := asked(t, xdg, "ps"); !strings.Contains(got, strconv.Itoa(a.Process.Pid)) || strings.Contains(got, "geheim") ||
		strings.Contains(got, "al@") {
		t.Error(got)
	}

	pid := strconv.Itoa(a.Process.Pid)
	got := asked(t, xdg, "status", "--pid", pid)
	if !strings.HasPrefix(got, "exit 0\n") || !strings.Contains(got, "process "+pid+"\n  program sh, process ") ||
		strings.Contains(got, "\nhost:") ||
		strings.Contains(got, "geheim") {
		t.Error(got)
	}
	if got := asked(t, xdg, "flows", "--pid", pid); got != "exit 0\n--- stdout\nthere are no flows\n--- stderr\n" {
		t.Error(got)
	}
	for _, args := range [][]string{{"status", "--pid", strconv.Itoa(os.Getpid())}, append([]string{"status"}, dir...)} {
		got := asked(t, xdg, args...)
		oneLine(t, got)
		if !strings.HasPrefix(got, "exit 1\n") || !strings.Contains(got, "'viasocks ps'") {
			t.Error(got)
		}
	}

	sockets := func() int { return socketsIn(t, xdg) }
	endA()
	if n := sockets(); n != 1 {
		t.Errorf("%d sockets after the first has ended", n)
	}
	_ = b.Process.Kill()
	_ = b.Wait()
	if n := sockets(); n != 1 {
		t.Errorf("%d sockets after the second was killed: the test tests nothing", n)
	}
	if _, live := listed(t, xdg)[b.Process.Pid]; live || sockets() != 0 {
		t.Errorf("%d sockets after ps", sockets())
	}
	_, endC := instance(t, xdg, s.URL())
	endC()
	testkit.Eventually(t, "the directory is gone", func() bool {
		_, err := os.Stat(filepath.Join(xdg, "viasocks"))
		return os.IsNotExist(err)
	})
}

// listed is what ps lists, by process id.
func listed(t *testing.T, xdg string) map[int]control.Instance {
	t.Helper()
	out := asked(t, xdg, "ps", "--json")
	_, out, _ = strings.Cut(out, "--- stdout\n")
	out, _, _ = strings.Cut(out, "--- stderr\n")
	var all []control.Instance
	if err := json.NewDecoder(bytes.NewReader([]byte(out))).Decode(&all); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	m := map[int]control.Instance{}
	for _, i := range all {
		m[i.PID] = i
	}
	return m
}

// socketsIn counts the control sockets in a runtime directory.
func socketsIn(t *testing.T, xdg string) int {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(xdg, "viasocks", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// flows shows the program that a flow belongs to, its process id and its executable.
func TestFlowsOfRun(t *testing.T) {
	bash := lookPath(t, "bash")
	s := carrying(t)
	needNamespaces(t, s)
	xdg := t.TempDir()
	cmd, _, _ := instanceOf(t, xdg, s.URL(), bash, "exec 3<>/dev/tcp/203.0.113.9/80; echo up; read x")
	out := asked(t, xdg, "flows", "--json", "--pid", strconv.Itoa(cmd.Process.Pid))
	_, out, _ = strings.Cut(out, "--- stdout\n")
	var flows control.Flows
	if err := json.NewDecoder(strings.NewReader(out)).Decode(&flows); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if len(flows.Flows) != 1 {
		t.Fatal(out)
	}
	f := flows.Flows[0]
	exe, err := os.Readlink("/proc/" + strconv.Itoa(f.PID) + "/exe")
	if f.State != "open" || f.Dst != "203.0.113.9:80" || f.PID == 0 || err != nil || f.Exe != exe ||
		filepath.Base(exe) != "bash" {
		t.Errorf("%+v, %s, %v", f, exe, err)
	}
}

// carrying is a proxy that reaches an echo server in place of every destination.
func carrying(t *testing.T) *sockstest.Server {
	t.Helper()
	far, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { far.Close() })
	go func() {
		for {
			c, err := far.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	return server(t, sockstest.WithDial(func(ctx context.Context, _ sockstest.Addr) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", far.Addr().String())
	}))
}

// flows --watch prints what happens to the flows of a program, and ends with an error when its viasocks ends.
func TestWatchRun(t *testing.T) {
	bash := lookPath(t, "bash")
	s := carrying(t)
	needNamespaces(t, s)
	xdg := t.TempDir()
	script := "echo up; while read x; do exec 3<>/dev/tcp/203.0.113.9/80; echo hello >&3; read y <&3; read x; exec 3>&-; done"
	cmd, in, end := instanceOf(t, xdg, s.URL(), bash, script)
	watcher := viasocks("flows", "--watch", "--json", "--pid", strconv.Itoa(cmd.Process.Pid))
	watcher.Env = append(watcher.Env, "XDG_RUNTIME_DIR="+xdg)
	out, err := watcher.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	watcher.Stderr = &stderr
	if err := watcher.Start(); err != nil {
		t.Fatal(err)
	}
	defer watcher.Process.Kill()
	limit := time.AfterFunc(testkit.Patience, func() { watcher.Process.Kill() })
	defer limit.Stop()
	seen, told := make(chan struct{}), make(chan struct{})
	go func() { // the watch begins at some moment: connections are made, each ends before the next, until one was seen to the end
		defer close(told)
		for {
			_, _ = io.WriteString(in, "go\n")
			select {
			case <-seen:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	}()
	kinds := eventsOfOne(t, bufio.NewScanner(out))
	close(seen)
	if got := strings.Join(kinds, " "); got != "opened dialled established closed" {
		t.Error(got)
	}
	<-told
	end()
	_ = watcher.Wait()
	if code := watcher.ProcessState.ExitCode(); code != 1 || stderr.String() != "viasocks: viasocks has ended\n" {
		t.Errorf("exit %d: %s", code, &stderr)
	}
}

// eventsOfOne reads events until a flow was seen from its beginning to its end, and returns what happened to that one.
func eventsOfOne(t *testing.T, lines *bufio.Scanner) (kinds []string) {
	t.Helper()
	first := uint64(0)
	for lines.Scan() {
		var e control.Event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil || e.Flow == nil {
			t.Fatalf("%s: %v", lines.Text(), err)
		}
		// On a busy machine a flow may end before its program was looked up; a later one shows it.
		if first == 0 && e.Event == control.EventOpened && e.PID != 0 {
			first = e.ID
		}
		if e.ID != first {
			continue
		}
		if kinds = append(kinds, e.Event); e.Dst != "203.0.113.9:80" || e.PID == 0 || filepath.Base(e.Exe) != "bash" {
			t.Error(lines.Text())
		}
		if e.Event == control.EventClosed {
			if e.Up != 6 || e.Down != 6 || e.State != "closed" {
				t.Error(lines.Text())
			}
			return kinds
		}
	}
	return kinds
}

// top needs a terminal, and a viasocks to show. Root sees the programs of others too, which may run meanwhile.
func TestTopErrors(t *testing.T) {
	s := server(t)
	needNamespaces(t, s)
	xdg := t.TempDir()
	for n, want := range []string{
		"none of your programs is under 'viasocks run'",
		"is not a terminal: 'viasocks flows --watch' prints lines",
		"among 2 programs under 'viasocks run': give --pid: ",
	} {
		if n > 0 {
			instance(t, xdg, s.URL())
		}
		none := t.TempDir() + "/none"
		for _, command := range []string{"top", "status", "flows"} {
			got := asked(t, xdg, command, "--state-dir", none)
			oneLine(t, got)
			if !strings.HasPrefix(got, "exit 1\n") ||
				!strings.Contains(got, "none is up in this network namespace with --state-dir "+none) {
				t.Errorf("%d programs, %s: %s", n, command, got)
			}
		}
		got := asked(t, xdg, "top")
		oneLine(t, got)
		cmd := viasocks("ps", "--json")
		cmd.Env = append(cmd.Env, "XDG_RUNTIME_DIR="+xdg)
		list, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		if others := strings.Count(string(list), `"pid"`) - n; others != 0 {
			t.Logf("%d other programs are under run: %s", others, got)
			continue
		}
		if !strings.HasPrefix(got, "exit 1\n") || !strings.Contains(got, want) {
			t.Errorf("%d programs: %s", n, got)
		}
	}
}
