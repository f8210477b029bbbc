package netns

import (
	"bytes"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestUsernsHint(t *testing.T) {
	for _, c := range []struct {
		sysctls map[string]string
		want    string
	}{
		{map[string]string{"user.max_user_namespaces": "0"},
			": run 'sysctl -w user.max_user_namespaces=10000' as root, or run this as root"},
		{map[string]string{"kernel.unprivileged_userns_clone": "0"},
			": run 'sysctl -w kernel.unprivileged_userns_clone=1' as root, or run this as root"},
		{map[string]string{"kernel.apparmor_restrict_unprivileged_userns": "1"},
			": run 'sysctl -w kernel.apparmor_restrict_unprivileged_userns=0' as root, or run this as root"},
		{map[string]string{"user.max_user_namespaces": "9", "kernel.unprivileged_userns_clone": "1"},
			": run this as root, or in a container allow it user namespaces (seccomp)"},
	} {
		if got := usernsHint(func(k string) string { return c.sysctls[k] }); got != c.want {
			t.Errorf("%v: %q, want %q", c.sysctls, got, c.want)
		}
	}
	if got := startError(false, unix.EPERM).Error(); !strings.HasPrefix(
		got,
		"cannot make a network namespace: operation not permitted: in a container",
	) {
		t.Error(got)
	}
	if got := startError(true, unix.EPERM).Error(); !strings.HasPrefix(
		got,
		"cannot make a user namespace: operation not permitted: run",
	) {
		t.Error(got)
	}
}

func TestResolvContent(t *testing.T) {
	servers := []netip.Addr{netip.MustParseAddr("192.0.2.1")}
	for _, c := range []struct{ old, want string }{
		{"", ""},
		{"nameserver 10.0.0.1\n# c\n; d\n", ""},
		{"search a.example  b.example\ndomain x\nnameserver 1.2.3.4", "search a.example b.example\ndomain x\n"},
		{"options trust-ad\n", ""},
		{"options ndots:5 trust-ad edns0\n", "options ndots:5 edns0\n"},
		{"options\nsearch\nsortlist 10.0.0.0\n\x00\xff", "sortlist 10.0.0.0\n"},
	} {
		if got := resolvContent(servers, nil, false, c.old); got != "nameserver 192.0.2.1\n"+c.want {
			t.Errorf("%q became %q", c.old, got)
		}
	}
}

// TestResolvSearch: another search list, and names with a dot as they are.
func TestResolvSearch(t *testing.T) {
	servers := []netip.Addr{netip.MustParseAddr("192.0.2.1")}
	const old = "search a.example b.example\noptions ndots:5 edns0\nsortlist 10.0.0.0\n"
	for _, c := range []struct {
		search []string
		asIs   bool
		want   string
	}{
		{nil, true, "search a.example b.example\noptions edns0\nsortlist 10.0.0.0\n"},
		{[]string{"c.example", "d.example"}, false, "search c.example d.example\noptions ndots:5 edns0\nsortlist 10.0.0.0\n"},
		{[]string{"."}, true, "search .\noptions edns0\nsortlist 10.0.0.0\n"},
	} {
		if got := resolvContent(servers, c.search, c.asIs, old); got != "nameserver 192.0.2.1\n"+c.want {
			t.Errorf("%q, %v: %q", c.search, c.asIs, got)
		}
	}
}

func TestNsswitchContent(t *testing.T) {
	for _, c := range []struct{ old, want string }{
		{"", ""},
		{"passwd: files systemd\nhosts:\tfiles dns # as is\n", "passwd: files systemd\nhosts:\tfiles dns # as is\n"},
		{"hosts: files myhostname dns", "hosts: files myhostname dns"},
		{"hosts: files mdns4_minimal [NOTFOUND=return] dns\n", "hosts: files dns\n"},
		{"hosts: mymachines resolve [!UNAVAIL=return] files myhostname dns\nnetworks: files\n",
			"hosts: files myhostname dns\nnetworks: files\n"},
		{"  hosts : resolve\n", "hosts: files dns\n"},
		{"hosts: sss", "hosts: dns\n"},
		{"hosts: files [SUCCESS=continue  NOTFOUND=continue]dns[!UNAVAIL=return] wins [ x", "hosts: files " +
			"[SUCCESS=continue NOTFOUND=continue] dns [!UNAVAIL=return]\n"},
		{"hosts: files [broken sss\n", "hosts: files [broken sss\n"},
		{"#hosts: resolve\npasswd: sss # hosts: resolve\nhosts: dns resolve # why\n",
			"#hosts: resolve\npasswd: sss # hosts: resolve\nhosts: files dns\n"},
		{"hosts: DNS\n", "hosts: dns\n"},
	} {
		if got := nsswitchContent(c.old); got != c.want {
			t.Errorf("%q became %q, want %q", c.old, got, c.want)
		}
		if got := nsswitchContent(c.want); got != c.want {
			t.Errorf("%q became %q: it should stay", c.want, got)
		}
	}
}

func TestResolveLink(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	p := func(s string) string { return filepath.Join(dir, s) }
	os.MkdirAll(p("run/real"), 0o755)
	os.WriteFile(p("run/real/file"), nil, 0o644)
	for link, to := range map[string]string{"alias": "run", "a": "b", "b": p("alias/real/file"), "dangling": "alias/real/none",
		"loop": "loop", "nodir": "no/such"} {
		if err := os.Symlink(to, p(link)); err != nil {
			t.Fatal(err)
		}
	}
	for in, want := range map[string]string{"a": "run/real/file", "dangling": "run/real/none", "run/real/file": "run/real/file",
		"none": "none", "nodir": "no/such"} {
		if got, err := resolveLink(p(in)); got != p(want) || err != nil {
			t.Errorf("%s: %s, %v", in, got, err)
		}
	}
	if _, err := resolveLink(p("loop")); !errors.Is(err, unix.ELOOP) {
		t.Errorf("loop: %v", err)
	}
}

func TestMountsBelow(t *testing.T) {
	const info = `22 1 0:20 / /sys rw,relatime - sysfs sysfs rw
23 22 0:7 / /sys/kernel/security rw - securityfs securityfs rw
24 22 0:21 / /sys/fs/cgroup ro - tmpfs tmpfs ro
25 24 0:22 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
26 22 0:23 / /sys/with\040space rw - tmpfs tmpfs rw
27 1 0:24 / /system rw - tmpfs tmpfs rw
broken
`
	want := []string{"/sys/kernel/security", "/sys/fs/cgroup", "/sys/with space"}
	if got := mountsBelow(strings.NewReader(info), "/sys"); !reflect.DeepEqual(got, want) {
		t.Errorf("%q", got)
	}
}

func TestStopped(t *testing.T) {
	if stopped(os.Getpid()) || stopped(1<<30) {
		t.Error("a running process, or none, is stopped")
	}
}

func FuzzReadFrame(f *testing.F) {
	f.Add(frame([]byte("{}")), 0)
	f.Add(frame(nil), 4)
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 1}, 2)
	f.Add([]byte{0, 0}, 1)
	f.Fuzz(func(t *testing.T, b []byte, had int) {
		if had < 0 || had > len(b) {
			return
		}
		got, err := readFrame(bytes.NewReader(b[had:]), b[:had])
		if err == nil && !bytes.HasPrefix(b, frame(got)) {
			t.Errorf("% x read as % x", b, got)
		}
		if err == nil && len(got) > maxMessage {
			t.Error("too long")
		}
	})
}

func FuzzResolvContent(f *testing.F) {
	f.Add("search a b\noptions edns0 trust-ad\nnameserver 127.0.0.53\n")
	f.Add("options\t\x00\r\nsearch \xff")
	f.Fuzz(func(t *testing.T, old string) {
		out := resolvContent([]netip.Addr{netip.MustParseAddr("192.0.2.1")}, nil, false, old)
		if strings.Count("\n"+out, "\nnameserver ") != 1 {
			t.Errorf("%q became %q", old, out)
		}
	})
}

func FuzzNsswitchContent(f *testing.F) {
	f.Add("passwd: files sss\nhosts: mymachines resolve [!UNAVAIL=return] files myhostname dns\n")
	f.Add("hosts: [ ] mdns4_minimal [NOTFOUND=return] dns[a]wins # x\r\nhosts:")
	f.Fuzz(func(t *testing.T, old string) {
		out := nsswitchContent(old)
		if again := nsswitchContent(out); again != out {
			t.Errorf("%q became %q and then %q", old, out, again)
		}
		if len(out) > len(old)+64+16*strings.Count(old, "\n") {
			t.Errorf("%d bytes became %d", len(old), len(out))
		}
	})
}

func TestMainIfChildIgnoresOthers(t *testing.T) {
	defer func(old []string) { os.Args = old }(os.Args)
	for _, args := range [][]string{{helperName}, {helperName, "x"}, {helperName, "0"}, {helperName, "99999"},
		{"viasocks", "3"}} {
		os.Args = args
		MainIfChild() // must return
	}
}
