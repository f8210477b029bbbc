package netns

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// asUser is the uid of the tests without root, when they are run by root.
const asUser = 54321

// TestSpawnHostResolvers has a host with systemd-resolved and nscd.
func TestSpawnHostResolvers(t *testing.T) {
	emptyDirs(t, "/etc", "/run")
	for _, d := range []string{"/run/systemd/resolve", "/run/nscd", "/run/resolvconf"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	os.WriteFile("/run/nscd/socket", nil, 0o666)
	os.WriteFile("/run/systemd/resolve/io.systemd.Resolve", nil, 0o666)
	os.WriteFile(
		"/run/systemd/resolve/stub-resolv.conf",
		[]byte("nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch lan\n"),
		0o644,
	)
	os.WriteFile("/run/resolvconf/resolv.conf", []byte("nameserver 10.0.0.1\n"), 0o644)
	defer unix.Umask(unix.Umask(0o077))
	const want = "nameserver 192.0.2.53\nnameserver 2001:db8::53\n"
	for _, c := range []struct{ link, want string }{
		{"../run/systemd/resolve/stub-resolv.conf", want + "options edns0\nsearch lan\n"},
		{"/run/resolvconf/resolv.conf", want},
	} {
		os.Remove(resolvConf)
		if err := os.Symlink(c.link, resolvConf); err != nil {
			t.Fatal(err)
		}
		out, exit, err := run(
			t,
			testSpec(
				"/bin/sh",
				"-c",
				"cat /etc/resolv.conf; ls -l /etc/resolv.conf | cut -c1; stat -Lc %a /etc/resolv.conf; ls /run/nscd; "+
					"ls /run/systemd/resolve | grep -v stub; ls /tmp | grep '^resolv.conf'",
			),
		)
		if out != c.want+"l\n644\n" || err != nil || exit != 1 {
			t.Errorf("%s: %q, %d, %v", c.link, out, exit, err)
		}
	}
	// Links to what does not exist: a file, and the whole directory. The host's stay as they are.
	os.Remove("/run/resolvconf/resolv.conf")
	os.Symlink("/run/gone/resolv.conf", "/run/resolvconf/link")
	for _, link := range []string{"/run/resolvconf/resolv.conf", "/run/gone/resolv.conf", "../run/resolvconf/link"} {
		danglingResolver(t, link)
	}
	noResolver(t)
}

// emptyDirs puts empty directories in place of the host's until the test is over, or skips the test where that cannot be done.
func emptyDirs(t *testing.T, dirs ...string) {
	t.Helper()
	if os.Geteuid() != 0 || noNamespace != "" {
		t.Skip("needs root and a mount namespace: ", noNamespace)
	}
	for _, dir := range dirs {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	}
}

// danglingResolver makes /etc/resolv.conf a link to nothing, and looks at it inside, as root and without.
func danglingResolver(t *testing.T, link string) {
	t.Helper()
	os.Remove(resolvConf)
	if err := os.Symlink(link, resolvConf); err != nil {
		t.Fatal(err)
	}
	t.Run("root", TestSpawnDanglingResolver)
	if out, err := asOrdinaryUser("-test.run=^TestSpawnDanglingResolver$", "-test.v"); err != nil ||
		!bytes.Contains(out, []byte("--- PASS")) {
		t.Errorf("without root, %s: %v\n%s", link, err, out)
	}
	if to, err := os.Readlink(resolvConf); to != link || err != nil {
		t.Errorf("the host's is a link to %q, %v", to, err)
	}
	if _, err := os.Stat(resolvConf); !os.IsNotExist(err) {
		t.Errorf("%s is there: %v", link, err)
	}
}

// noResolver removes /etc/resolv.conf: only who asks for a nameserver needs one.
func noResolver(t *testing.T) {
	t.Helper()
	os.Remove(resolvConf)
	if c, err := Spawn(t.Context(), testSpec("true")); err == nil ||
		!strings.Contains(err.Error(), "/etc/resolv.conf does not exist: make it") {
		t.Errorf("%v", err)
		if err == nil {
			c.Close()
		}
	}
	s := testSpec("true")
	s.Nameserver = nil
	if _, exit, err := run(t, s); exit != 0 || err != nil {
		t.Errorf("without a nameserver: %d, %v", exit, err)
	}
}

// TestSpawnDanglingResolver is a part of TestSpawnHostResolvers, which makes /etc/resolv.conf a link to nothing.
func TestSpawnDanglingResolver(t *testing.T) {
	if _, err := os.Stat(resolvConf); !isLink(resolvConf) || !os.IsNotExist(err) {
		t.Skip("/etc/resolv.conf is there")
	}
	out, exit, err := run(t, testSpec("/bin/sh", "-c", "cat /etc/resolv.conf; stat -Lc %a /etc/resolv.conf"))
	if out != "nameserver 192.0.2.53\nnameserver 2001:db8::53\n644\n" || err != nil || exit != 0 {
		t.Errorf("%q, %d, %v", out, exit, err)
	}
}

// TestRootless runs the tests of Spawn as an ordinary user.
func TestRootless(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("the tests run without root as it is")
	}
	if st, err := os.Stat(tunNode); noNamespace != "" || err != nil || st.Mode().Perm() != 0o666 {
		t.Skip("no TUN node for everyone could be made: ", noNamespace, err)
	}
	out, err := asOrdinaryUser("-test.run=^TestSpawn", "-test.v")
	if err != nil || !bytes.Contains(out, []byte("--- PASS: TestSpawnWorld")) {
		t.Errorf("%v\n%s", err, out)
	}
	for _, line := range strings.Split(string(out), "\n") {
		if strings.Contains(line, "SKIP") {
			t.Log(line)
		}
	}
}

func asOrdinaryUser(args ...string) ([]byte, error) {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(slices.Clone(os.Environ()), "HOME=/")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: asUser, Gid: asUser}}
	return cmd.CombinedOutput()
}

const nsswitch = "/etc/nsswitch.conf"

// TestSpawnNsswitch has hosts whose nsswitch.conf names sources that ask a process of the host.
func TestSpawnNsswitch(t *testing.T) {
	dirs := []string{"/etc", "/run"}
	if _, err := os.Stat("/usr/etc"); err == nil {
		dirs = append(dirs, "/usr/etc")
	}
	emptyDirs(t, dirs...)
	write := func(path, content string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	const (
		old  = "passwd: files systemd\nhosts: mymachines resolve [!UNAVAIL=return] files myhostname dns\n"
		want = "passwd: files systemd\nhosts: files myhostname dns\n"
	)
	write(resolvConf, "")
	l, err := net.Listen("unix", "/run/mdnsd")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	os.Mkdir("/etc/static", 0o755)
	for _, c := range []struct {
		name, want string
		make       func()
	}{
		{"file", want, func() { write(nsswitch, old) }},
		{"link", want, func() { os.Rename(nsswitch, "/etc/static/nsswitch.conf"); os.Symlink("static/nsswitch.conf", nsswitch) }},
		{"link to nothing", "", func() { os.Remove("/etc/static/nsswitch.conf") }},
		{"absent", "", func() { os.Remove(nsswitch) }},
		{"nothing to change", "hosts: files dns # as is\n", func() { write(nsswitch, "hosts: files dns # as is\n") }},
		{"read-only", want, func() {
			write(nsswitch, old)
			write("/etc/hosts", "198.51.100.9 host.example\n")
			if err := unix.Mount("", "/etc", "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		c.make()
		hosts := "0\n"
		if c.name == "read-only" {
			hosts = "1\n"
		} else {
			write("/etc/hosts", "")
		}
		seesNsswitch(t, c.name, c.want+hosts)
		if b, _ := os.ReadFile(nsswitch); c.want != "" && c.name != "nothing to change" && string(b) != old {
			t.Errorf("%s: the host's own became %q", c.name, b)
		}
	}
	if c, err := net.Dial("unix", "/run/mdnsd"); err != nil {
		t.Errorf("the host's own socket: %v", err)
	} else {
		c.Close()
	}
}

// seesNsswitch looks at nsswitch.conf, the socket of mdnsd and /etc/hosts inside, with a nameserver and without.
func seesNsswitch(t *testing.T, name, want string) {
	t.Helper()
	script := "cat " + nsswitch + " 2>/dev/null; test -S /run/mdnsd && echo socket; grep -c 198.51.100.9 /etc/hosts"
	s := testSpec("/bin/sh", "-c", script)
	if out, _, err := run(t, s); out != want || err != nil {
		t.Errorf("%s: %q, %v, want %q", name, out, err, want)
	}
	s = testSpec("/bin/sh", "-c", script)
	s.Nameserver = nil
	if out, _, err := run(t, s); out != want || err != nil {
		t.Errorf("%s, with the host's resolv.conf: %q, %v, want %q", name, out, err, want)
	}
}
