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

// published is a viasocks that publishes the echo server which it runs.
type published struct {
	cmd  *exec.Cmd
	port string
	log  *harness.Log
}

// publishEcho starts one as a user, with a search path and a home directory.
func publishEcho(t *testing.T, proxy string, uid int, path, home string) published {
	t.Helper()
	p := published{log: &harness.Log{}}
	p.cmd = exec.Command(viasocks, "run", "--proxy", proxy, "--log-level", "info", "--publish", "0:80", "--",
		"/usr/bin/socat", "TCP-LISTEN:80,fork,reuseaddr", "PIPE")
	p.cmd.Env, p.cmd.Dir, p.cmd.Stderr = []string{"PATH=" + path, "HOME=" + home}, home, p.log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.cmd.Process.Signal(syscall.SIGTERM); _ = p.cmd.Wait() })
	testkit.Eventually(t, "it is ready", func() bool { return strings.Contains(p.log.String(), "msg=ready") })
	_, after, _ := strings.Cut(p.log.String(), "port=127.0.0.1:")
	p.port, _, _ = strings.Cut(after, ":")
	p.answers(t)
	return p
}

// answers waits until the port is answered.
func (p published) answers(t *testing.T) {
	t.Helper()
	testkit.Eventually(t, "the port answers", func() bool {
		c, err := echoed(p.port)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// maker returns the process that makes sockets.
func (p published) maker(t *testing.T) (pid int) {
	t.Helper()
	list := childrenNamed(p.cmd.Process.Pid, "viasocks-sockets")
	if len(list) != 1 {
		t.Fatalf("the processes that make sockets are %v", list)
	}
	if _, err := fmt.Sscan(list[0], &pid); err != nil {
		t.Fatal(err)
	}
	return pid
}

// killMaker sends a signal to the process that makes sockets.
func (p published) killMaker(t *testing.T, sig syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(p.maker(t), sig); err != nil {
		t.Fatal(err)
	}
}

// TestPublishMakerKilled: when the process that makes sockets is killed, the published port answers the very next connection,
// by another such process that can do no more than the first one. Connections that exist stay. This holds as root and as an
// ordinary user.
func TestPublishMakerKilled(t *testing.T) {
	if !apart(t) {
		return
	}
	needWorld(t)
	if _, err := os.Stat("/usr/bin/socat"); err != nil {
		t.Skip(err)
	}
	proxy := listenSOCKS(t)
	asUsers(t, func(t *testing.T, uid int, dir string) {
		p := publishEcho(t, proxy.URL(), uid, os.Getenv("PATH"), dir)
		old, err := echoed(p.port)
		if err != nil {
			t.Fatal(err)
		}
		defer old.Close()
		p.replacesMaker(t)
		p.killMaker(t, syscall.SIGKILL) // the next one is started after a pause, in which the port refuses
		p.answers(t)
		if err := echo(old, "still there"); err != nil {
			t.Errorf("the connection from before: %v", err)
		}
		const ended = `viasocks-sockets has ended unexpectedly: it is started again" how="signal 9 (killed)"`
		if all := strings.Count(p.log.String(), "level=WARN"); all != 2 || strings.Count(p.log.String(), ended) != 2 {
			t.Errorf("%d warnings:\n%s", all, p.log)
		}
		last := p.maker(t)
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		_ = p.cmd.Wait()
		if _, err := os.Stat(fmt.Sprint("/proc/", last)); err == nil {
			t.Error("the process that makes sockets is still there")
		}
		if uid != 0 {
			p := publishEcho(t, proxy.URL(), uid, dir, dir) // the search path has no nsenter
			p.killMaker(t, syscall.SIGKILL)
			testkit.Eventually(t, "the log says why", func() bool {
				return strings.Contains(p.log.String(), "nsenter is not installed: install util-linux")
			})
			if c, err := echoed(p.port); err == nil {
				c.Close()
				t.Error("the port answers although nothing can make sockets")
			}
		}
	})
}

// replacesMaker kills the process that makes sockets, and wants the next connection to be carried by one like it.
func (p published) replacesMaker(t *testing.T) {
	t.Helper()
	p.killMaker(t, syscall.SIGTERM) // which a service manager sends to all processes, and which it ignores
	first := p.maker(t)
	able, holds := aboutMaker(t, first)
	p.killMaker(t, syscall.SIGKILL)
	began := time.Now()
	if c, err := echoed(p.port); err != nil {
		t.Errorf("the first connection after the death: %v\n%s", err, p.log)
	} else {
		t.Logf("the first connection after the death took %v", time.Since(began))
		c.Close()
	}
	second := p.maker(t)
	now, has := aboutMaker(t, second)
	if second == first || now != able {
		t.Errorf("the process %d is\n%s\nand %d was\n%s", second, now, first, able)
	}
	if slices.ContainsFunc(has, func(f string) bool { return !slices.Contains(holds, f) }) {
		t.Errorf("the process %d has the files %q, and %d had %q", second, has, first, holds)
	}
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
	inNamedStates(t, func(t *testing.T, proxy, before string) {
		cmd := exec.Command(viasocks, "run", "--proxy", proxy, "--log-level", "info", "--publish", "0:80",
			"--netns", "blue", "--", "sleep", "60")
		startPublished(t, cmd)
		first := theRestorer(t, cmd.Process.Pid)
		signalPID(t, first, syscall.SIGKILL)
		testkit.Eventually(t, "another process that restores", func() bool {
			now := childrenNamed(cmd.Process.Pid, restorerName)
			return len(now) == 1 && now[0] != first
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
