package e2e

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/harness"
	"github.com/viasocks/viasocks/stack/testkit"
)

// echoed dials the port and returns the connection after its first echo.
func echoed(port string) (c net.Conn, err error) {
	if c, err = net.DialTimeout("tcp", "127.0.0.1:"+port, testkit.Patience); err != nil {
		return nil, err
	}
	if err = echo(c, "hello"); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// echo sends text and reads it back.
func echo(c net.Conn, text string) error {
	if err := c.SetDeadline(time.Now().Add(testkit.Patience)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	b := make([]byte, len(text))
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	if string(b) != text {
		return fmt.Errorf("%q came back for %q", b, text)
	}
	return nil
}

// TestPublishMakerKilled: when the process that makes sockets is killed, the published port answers the very next connection,
// by another such process that can do no more than the first one. Connections that exist stay. This holds as root and as an
// ordinary user.
func TestPublishMakerKilled(t *testing.T) {
	if !apart(t) {
		return
	}
	needWorld(t)
	socat, err := exec.LookPath("socat")
	if err != nil {
		t.Skip(err)
	}
	proxy := listenSOCKS(t)
	asUsers(t, func(t *testing.T, uid int, dir string) {
		start := func(path string) (cmd *exec.Cmd, port string, log *harness.Log) {
			log = &harness.Log{}
			cmd = exec.Command(viasocks, "run", "--proxy", proxy.URL(), "--log-level", "info", "--publish", "0:80", "--",
				socat, "TCP-LISTEN:80,fork,reuseaddr", "PIPE")
			cmd.Env, cmd.Dir, cmd.Stderr = []string{"PATH=" + path, "HOME=" + dir}, dir, log
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = cmd.Process.Signal(syscall.SIGTERM); _ = cmd.Wait() })
			testkit.Eventually(t, "it is ready", func() bool { return strings.Contains(log.String(), "msg=ready") })
			_, after, _ := strings.Cut(log.String(), "port=127.0.0.1:")
			port, _, _ = strings.Cut(after, ":")
			testkit.Eventually(t, "the program listens", func() bool {
				c, err := echoed(port)
				if err == nil {
					c.Close()
				}
				return err == nil
			})
			return cmd, port, log
		}
		cmd, port, log := start(os.Getenv("PATH"))
		old, err := echoed(port)
		if err != nil {
			t.Fatal(err)
		}
		defer old.Close()
		first := theMaker(t, cmd.Process.Pid)
		if err := syscall.Kill(first, syscall.SIGTERM); err != nil { // a service manager sends it to all processes
			t.Fatal(err)
		}
		able, holds := aboutMaker(t, first)
		if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		c, err := echoed(port)
		if err != nil {
			t.Errorf("the first connection after the death: %v\n%s", err, log)
		} else {
			t.Logf("the first connection after the death took %v", time.Since(began))
			c.Close()
		}
		second := theMaker(t, cmd.Process.Pid)
		if now, _ := aboutMaker(t, second); second == first || now != able {
			t.Errorf("the process %d is\n%s\nand %d was\n%s", second, now, first, able)
		}
		if _, now := aboutMaker(t, second); slices.ContainsFunc(now, func(f string) bool { return !slices.Contains(holds, f) }) {
			t.Errorf("the process %d has the files %q, and %d had %q", second, now, first, holds)
		}
		// The next one is started after a pause, in which the port refuses.
		if err := syscall.Kill(second, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		testkit.Eventually(t, "the port answers again", func() bool {
			c, err := echoed(port)
			if err == nil {
				c.Close()
			}
			return err == nil
		})
		if err := echo(old, "still there"); err != nil {
			t.Errorf("the connection from before: %v", err)
		}
		if said := strings.Count(log.String(), "level=WARN"); said != 2 ||
			strings.Count(log.String(), `viasocks-sockets has ended unexpectedly: it is started again" how="signal 9 (killed)"`) != 2 {
			t.Errorf("%d warnings:\n%s", said, log)
		}
		third := theMaker(t, cmd.Process.Pid)
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if _, err := os.Stat(fmt.Sprint("/proc/", third)); err == nil {
			t.Error("the process that makes sockets is still there")
		}
		if uid == 0 {
			return
		}
		cmd, port, log = start(dir) // where there is no nsenter
		if err := syscall.Kill(theMaker(t, cmd.Process.Pid), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		testkit.Eventually(t, "the log says why", func() bool {
			return strings.Contains(log.String(), "nsenter is not installed: install util-linux")
		})
		if c, err := echoed(port); err == nil {
			c.Close()
			t.Error("the port answers although nothing can make sockets")
		}
	})
}

// theMaker returns the process of viasocks that makes sockets.
func theMaker(t *testing.T, viasocks int) (pid int) {
	t.Helper()
	list := childrenNamed(viasocks, "viasocks-sockets")
	if len(list) != 1 {
		t.Fatalf("the processes that make sockets are %v", list)
	}
	if _, err := fmt.Sscan(list[0], &pid); err != nil {
		t.Fatal(err)
	}
	return pid
}

// aboutMaker tells what a process is able to do, and which files it has.
func aboutMaker(t *testing.T, pid int) (able string, files []string) {
	t.Helper()
	if os.Getuid() != 0 {
		return "", nil // the kernel shows them to root only
	}
	dir := fmt.Sprintf("/proc/%d/", pid)
	var about strings.Builder
	for _, name := range []string{"net", "user"} {
		to, err := os.Readlink(dir + "ns/" + name)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(&about, to)
	}
	b, err := os.ReadFile(dir + "status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		for _, key := range []string{"Uid", "Gid", "Groups", "Cap", "NoNewPrivs"} {
			if strings.HasPrefix(line, key) {
				about.WriteString(line)
			}
		}
	}
	if b, err = os.ReadFile(dir + "cmdline"); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(&about, "%q\n", b)
	list, err := filepath.Glob(dir + "fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range list {
		to, _ := os.Readlink(f)
		kind, _, _ := strings.Cut(to, ":") // without the number
		files = append(files, kind)
	}
	return about.String(), files
}

// TestNamedNamespaceRestorerKilled: the process that restores a named namespace is replaced when it is killed, and its successor
// restores what was there before, not what it finds.
func TestNamedNamespaceRestorerKilled(t *testing.T) {
	if !apart(t) {
		return
	}
	for what, prepare := range namedStates {
		t.Run(what, func(t *testing.T) {
			needNamed(t, "blue")
			proxy := listenSOCKS(t)
			prepare(t, "blue")
			before := stateOf(t, "blue")
			cmd := exec.Command(viasocks, "run", "--proxy", proxy.URL(), "--log-level", "info", "--publish", "0:80",
				"--netns", "blue", "--", "sleep", "60")
			startPublished(t, cmd)
			first := childrenNamed(cmd.Process.Pid, "viasocks-restore")
			if len(first) != 1 {
				t.Fatalf("the processes that restore are %v", first)
			}
			signalPID(t, first[0], syscall.SIGKILL)
			testkit.Eventually(t, "another process that restores", func() bool {
				now := childrenNamed(cmd.Process.Pid, "viasocks-restore")
				return len(now) == 1 && now[0] != first[0]
			})
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			var after string
			if !waitFor(func() bool { after = stateOf(t, "blue"); return after == before }) {
				t.Error(changes(before, after))
			}
			testkit.Eventually(t, "only the program is left", func() bool { return len(pidsIn(t, "blue")) == 1 })
			for _, pid := range pidsIn(t, "blue") { // without a network it goes on, as the manual says
				signalPID(t, pid, syscall.SIGKILL)
			}
		})
	}
}
