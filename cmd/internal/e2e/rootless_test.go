package e2e

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

const nobody = 65534

// openTUNForAll puts a /dev/net/tun that everybody may open over the host's, in the test's own mount namespace, as
// distributions have it.
func openTUNForAll(t *testing.T) {
	t.Helper()
	node := filepath.Join(t.TempDir(), "tun")
	if err := unix.Mknod(node, unix.S_IFCHR|0o666, int(unix.Mkdev(10, 200))); err != nil {
		t.Skipf("cannot make a device node: %v", err)
	}
	if err := os.Chmod(node, 0o666); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(node, "/dev/net/tun", "", unix.MS_BIND, ""); err != nil {
		t.Skipf("cannot bind it: %v", err)
	}
	t.Cleanup(func() { unix.Unmount("/dev/net/tun", unix.MNT_DETACH) })
}

// asUsers runs f as a test for the user of this process and, if that is root, for an ordinary user, who may open the TUN. dir
// belongs to the user.
func asUsers(t *testing.T, f func(t *testing.T, uid int, dir string)) {
	users := []int{os.Getuid()}
	if os.Getuid() == 0 {
		openTUNForAll(t)
		users = append(users, nobody)
	}
	for _, uid := range users {
		t.Run(fmt.Sprint("uid ", uid), func(t *testing.T) {
			testkit.CheckLeaks(t)
			dir := t.TempDir()
			if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Chown(dir, uid, uid); err != nil {
				t.Fatal(err)
			}
			f(t, uid, dir)
		})
	}
}

// TestOrdinaryUser: a user without any privilege runs a program, which is carried, is still that user, and has no
// capability.
func TestOrdinaryUser(t *testing.T) {
	if !apart(t) {
		return
	}
	needWorld(t)
	if os.Getuid() != 0 {
		t.Skip("needs root, to become another user")
	}
	openTUNForAll(t)
	proxy := listenSOCKS(t)
	l, dst := listenTCP(t, world4)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Write([]byte("220 hello\n"))
			c.(*net.TCPConn).CloseWrite()
			io.Copy(io.Discard, c)
			c.Close()
		}
	}()
	// bash can open a TCP connection by itself.
	script := `id -u; grep -h -e CapEff -e NoNewPrivs /proc/self/status; ls /sys/class/net; exec 3<>/dev/tcp/` +
		dst.Addr().String() + `/` + strings.Split(dst.String(), ":")[1] + ` && cat <&3`
	cmd := exec.Command(viasocks, "run", "--proxy", proxy.URL(), "--", "bash", "-c", script)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=/"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(2*testkit.Patience, func() { cmd.Process.Kill() })
	defer timer.Stop()
	if err := cmd.Wait(); err != nil {
		t.Fatalf("viasocks run as an ordinary user: %v\n%s", err, &out)
	}
	const want = "65534\nCapEff:\t0000000000000000\nNoNewPrivs:\t1\nlo\ntun0\n220 hello\n"
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", &out, want)
	}
	if r := proxy.Requests(); len(r) != 1 || r[0].Dst.IP != dst.Addr() {
		t.Errorf("the proxy was asked for %v", r)
	}
}
