package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// TestPublishARIA2 reaches the RPC interface of a real aria2, which listens on its loopback only, by a TCP port and by a unix
// socket of the host, as root and as an ordinary user. Afterwards nothing is left.
func TestPublishARIA2(t *testing.T) {
	if !apart(t) {
		return
	}
	needWorld(t)
	if _, err := exec.LookPath("aria2c"); err != nil {
		t.Skip(err)
	}
	proxy := listenSOCKS(t)
	asUsers(t, func(t *testing.T, uid int, dir string) {
		path := filepath.Join(dir, "rpc")
		cmd := exec.Command(viasocks, "run", "--proxy", proxy.URL(), "--log-level", "info", "--publish", "0:6800",
			"--publish-unix", path+":6800", "--",
			"aria2c", "--no-conf", "--enable-rpc", "--quiet")
		cmd.Env, cmd.Dir = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir}, dir
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
		port := startPublished(t, cmd)
		ask := func(c *http.Client, url string) string {
			r, err := c.Post(url, "application/json", strings.NewReader(`{"jsonrpc":"2.0","id":"q","method":"aria2.getVersion"}`))
			if err != nil {
				return err.Error()
			}
			defer r.Body.Close()
			b, _ := io.ReadAll(r.Body)
			return string(b)
		}
		byTCP := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: testkit.Patience}
		testkit.Eventually(t, "an answer of aria2", func() bool {
			return strings.Contains(ask(byTCP, "http://127.0.0.1:"+port+"/jsonrpc"), "enabledFeatures")
		})
		byUnix := &http.Client{
			Transport: &http.Transport{
				DisableKeepAlives: true,
				DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
					return new(net.Dialer).DialContext(ctx, "unix", path)
				},
			},
			Timeout: testkit.Patience,
		}
		if got := ask(byUnix, "http://aria2/jsonrpc"); !strings.Contains(got, "enabledFeatures") {
			t.Errorf("by the unix socket: %s", got)
		}
		st := exec.Command(viasocks, "status", "--pid", fmt.Sprint(cmd.Process.Pid))
		st.Env, st.Dir = cmd.Env, dir
		st.SysProcAttr = cmd.SysProcAttr
		if got, err := st.CombinedOutput(); err != nil || !strings.Contains(string(got), ", "+path+":6800: 2 connections, ") {
			t.Errorf("status: %v\n%s", err, got)
		}
		maker := makers(cmd.Process.Pid)
		if len(maker) != 1 {
			t.Errorf("the processes that make sockets are %v", maker)
		}
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		if _, err := os.Lstat(path); err == nil {
			t.Error("the unix socket is still there")
		}
		for _, pid := range maker {
			if _, err := os.Stat("/proc/" + pid); err == nil {
				t.Error("the maker of sockets is still there")
			}
		}
	})
}

// After kill -9 of viasocks, the process that makes sockets ends, and the next run takes the place of the unix socket.
func TestPublishKilled(t *testing.T) {
	needWorld(t)
	proxy := listenSOCKS(t)
	path := filepath.Join(t.TempDir(), "s")
	var makersSeen []string
	for range 2 {
		cmd := exec.Command(viasocks, "run", "--proxy", proxy.URL(), "--log-level", "info", "--publish", "0:80", "--publish-unix",
			path+":80", "--", "sleep", "60")
		startPublished(t, cmd)
		var maker []string
		testkit.Eventually(t, "the process that makes sockets", func() bool {
			maker = makers(cmd.Process.Pid)
			return len(maker) == 1
		})
		program := children(cmd.Process.Pid)
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		makersSeen = append(makersSeen, maker...)
		for _, pid := range program { // without a network it goes on, as the manual says
			_ = exec.Command("kill", pid).Run()
		}
	}
	for _, pid := range makersSeen {
		testkit.Eventually(t, "the end of the process that makes sockets", func() bool {
			b, err := os.ReadFile("/proc/" + pid + "/cmdline")
			return err != nil || len(b) == 0
		})
	}
}

// startPublished starts cmd and returns the host's port of the first one that it publishes.
func startPublished(t *testing.T, cmd *exec.Cmd) (port string) {
	t.Helper()
	log, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	said, ready := bufio.NewScanner(log), make(chan string, 1)
	go func() {
		var all, at string
		for said.Scan() {
			all += said.Text() + "\n"
			if _, after, ok := strings.Cut(said.Text(), "port=127.0.0.1:"); ok && at == "" {
				at, _, _ = strings.Cut(after, ":")
			}
			if strings.Contains(said.Text(), "msg=ready") {
				ready <- at
			}
		}
		ready <- "ended: " + all
	}()
	select {
	case port = <-ready:
	case <-time.After(2 * testkit.Patience): // as startApp
		t.Fatal("it does not become ready")
	}
	if port == "" || strings.HasPrefix(port, "ended") {
		t.Fatal(port)
	}
	return port
}

// children lists the pids of a process's children.
func children(pid int) []string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid))
	list := strings.Fields(string(b))
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, task := range tasks {
		if b, _ := os.ReadFile(task); filepath.Base(filepath.Dir(task)) != fmt.Sprint(pid) {
			list = append(list, strings.Fields(string(b))...)
		}
	}
	return list
}

// makers lists the children that make sockets.
func makers(pid int) (list []string) {
	for _, child := range children(pid) {
		if b, _ := os.ReadFile("/proc/" + child + "/cmdline"); strings.HasPrefix(string(b), "viasocks-sockets") {
			list = append(list, child)
		}
	}
	return list
}
