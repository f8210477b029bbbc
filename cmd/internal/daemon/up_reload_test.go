package daemon

import (
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/cmd/internal/process"
	"github.com/viasocks/viasocks/cmd/internal/resolved"
	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun"
	"github.com/viasocks/viasocks/tun/tuntest"
)

// newUp is one that is up, over a TUN in memory, with what file says.
func newUp(t *testing.T, file string) (u *up, write func(string), log *strings.Builder) {
	t.Helper()
	u, write, theirs, log := startUp(t, file, nil)
	t.Cleanup(func() { theirs.Close() })
	return u, write, log
}

// startUp is newUp with an environment; theirs is the other end of the TUN.
func startUp(t *testing.T, file string, environ []string) (u *up, write func(string), theirs tun.Device, log *strings.Builder) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "conf")
	write = func(s string) {
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(file)
	args := []string{"--config", path}
	cfg, err := config.Parse(config.Up, args, environ)
	if err != nil {
		t.Fatal(err)
	}
	log = &strings.Builder{}
	e := &env{}
	e.log = slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: &e.level}))
	u = &up{
		teller:    resolved.New("", nil, slog.New(slog.DiscardHandler)),
		loops:     newLoopGuard(),
		UpOptions: UpOptions{Again: func() (*config.Config, error) { return cfg.Again(args, environ) }, Version: "test"},
		env:       e,
		first:     cfg,
		cfg:       cfg,
		state:     control.Ready,
		confirm:   make(chan struct{}, 1),
	}
	u.notify = process.NewNotifier(nil, e.log)
	u.allowed = newEndpoints(e.log)
	u.allowed.configure(cfg.Upstreams)
	pool, err := newPool(cfg, e.log)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := tuntest.Pipe(1500, 0)
	if u.plane, err = newPlane(cfg, ours, nil, dialing{allowed: u.allowed, pool: pool},
		slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	u.plane.start()
	t.Cleanup(u.plane.Close)
	u.listen()
	// The router takes a new policy when it runs.
	testkit.Eventually(t, "the router to run", func() bool { return u.plane.reload(cfg) == nil })
	return u, write, theirs, log
}

func TestReload(t *testing.T) {
	testkit.CheckLeaks(t)
	u, write, log := newUp(t, "proxy socks5://192.0.2.1\nmtu 1400\nconfirm 1m\n")
	write(
		"proxy socks5://al:geheim@192.0.2.2\nupstream b=socks5://192.0.2.3\nrule port 25 reject\nmtu 1500\nlog-level debug\n" +
			"exclude 192.0.2.0/24\nconfirm 1m\n" +
			"connect-timeout 3s\nhandshake-timeout 4s\nidle-timeout 1h\nudp-timeout 1m\nmax-pending 7\n" +
			"max-pending-per-destination 3\nmax-mappings 9\nstay-closed\n",
	)
	began := time.Now()
	u.reload()
	s := u.status()
	if len(s.Upstreams) != 2 || s.Upstreams[0].URL != "socks5://192.0.2.2:1080" || s.Rules[0].Rule != "port 25 reject" ||
		s.Reloaded == nil {
		t.Errorf("%+v", s)
	}
	if u.level.Level() != slog.LevelDebug {
		t.Error("the level is not the file's")
	}
	want := "changed in the file, and taken at the next start only: mtu"
	if !strings.Contains(log.String(), want) || len(s.Warnings) != 3 || s.Warnings[2] != want {
		t.Errorf("%q\n%s", s.Warnings, log)
	}
	if strings.Contains(log.String(), "geheim") {
		t.Errorf("shows the password: %s", log)
	}
	// The old proxy may be written to for a moment.
	if all := u.allowed.list(); len(all) != 3 && time.Since(began) < lingers {
		t.Errorf("%v", all)
	}

	for _, bad := range []string{"proxy socks5://al:geheim@192.0.2.9:x", "proxy ftp://192.0.2.9", "nonsense",
		"proxy socks5://198.18.0.1"} {
		log.Reset()
		write(bad)
		u.reload()
		if got := u.status(); got.Upstreams[0].URL != "socks5://192.0.2.2:1080" || strings.Count(log.String(), "\n") != 1 ||
			!strings.Contains(log.String(), "the configuration is unchanged") {
			t.Errorf("%s: %+v\n%s", bad, got.Upstreams, log)
		}
		if strings.Contains(log.String(), "geheim") {
			t.Errorf("shows the password: %s", log)
		}
	}
	if !testkit.Until(testkit.Patience, func() bool { return len(u.allowed.list()) == 2 }) {
		t.Fatalf("%v", u.allowed.list())
	}
}

func TestConfirmTwice(t *testing.T) {
	u := &up{loops: newLoopGuard(), state: control.Ready, confirm: make(chan struct{}, 1)}
	if err := u.confirmed(); err == nil || err.Error() != "there is nothing to confirm: it is ready" {
		t.Error(err)
	}
	u.state, u.confirmBy = control.Unconfirmed, new(time.Time)
	for range 2 { // the second does not block
		if err := u.confirmed(); err != nil {
			t.Error(err)
		}
	}
}

func TestOpensAfter(t *testing.T) {
	for _, tt := range []struct {
		result string
		open   bool
		want   bool
	}{{"SERVICE_RESULT=success", true, false}, {"SERVICE_RESULT=watchdog", true, true},
		{"SERVICE_RESULT=core-dump", false, false}, {"X=1", true, false}} {
		cfg := &config.Config{Host: config.Host{FailOpen: tt.open}}
		if got := opensAfter(cfg, []string{tt.result}); got != tt.want {
			t.Errorf("%+v: %v", tt, got)
		}
	}
}

func TestOwnership(t *testing.T) {
	for file, want := range map[string]string{
		"0::/system.slice/viasocks.service\n":                                 "system.slice/viasocks.service",
		"1:cpu:/x\n0::/system.slice/system-viasocks.slice/viasocks@a.service": "system.slice/system-viasocks.slice/viasocks@a.service",
		"0::/user.slice/user-0.slice/session-1.scope\n":                       "",
		"1:name=systemd:/system.slice/viasocks.service\n0::/\n":               "",
	} {
		path := filepath.Join(t.TempDir(), "cgroup")
		if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, _ := ownership(path); got != want {
			t.Errorf("%q: %q", file, got)
		}
	}
	if cgroup, uid := ownership("/does/not/exist"); cgroup != "" || (uid == nil) != (os.Geteuid() == 0) {
		t.Errorf("%q, %v", cgroup, uid)
	}
}

func TestNotOurs(t *testing.T) {
	a := func(s ...string) (out []netip.Addr) {
		for _, x := range s {
			out = append(out, netip.MustParseAddr(x))
		}
		return out
	}
	for _, tt := range []struct {
		in, want []netip.Addr
		err      string
	}{
		{a("192.0.2.1", "198.18.0.7", "2001:db8::1"), a("192.0.2.1", "2001:db8::1"), ""},
		{a("198.19.255.255"), nil, "its name stands for 198.19.255.255, inside 198.18.0.0/15, which viasocks uses itself"},
		{a("::ffff:198.18.0.1"), nil, "inside 198.18.0.0/15"},
		{a("fd76:6961:736f:636b::9"), nil, "inside fd76:6961:736f:636b::/64"},
		{nil, nil, ""},
	} {
		got, err := notOurs(tt.in)
		if !slices.Equal(got, tt.want) || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%v: %v, %v", tt.in, got, err)
		}
	}
}

func TestCheckProxies(t *testing.T) {
	u := &up{loops: newLoopGuard(), env: &env{log: slog.New(slog.DiscardHandler)}}
	for url, want := range map[string]string{
		"socks5://198.18.0.1": "cannot use the proxy socks5://198.18.0.1:1080: " +
			"its address is inside 198.18.0.0/15, which viasocks uses itself",
		"socks5://[fd76:6961:736f:636b::2]:9":      "inside fd76:6961:736f:636b::/64",
		"socks5://[fd76:6961:736f:636b::2%25eth0]": "inside fd76:6961:736f:636b::/64",
		"socks5://198.17.0.1":                      "",
		"socks5://proxy.example":                   "",
	} {
		err := u.checkProxies(parse(t, "--proxy", url))
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", url, err)
		}
	}
	if len(u.warnings) > 0 {
		t.Error(u.warnings)
	}
	if err := u.checkProxies(parse(t, "--proxy", "socks5://[fe80::1%25eth0]", "--exclude", "fe80::/10")); err != nil ||
		len(u.warnings) != 1 {
		t.Errorf("%v, %q", err, u.warnings)
	}
	u.warnings = nil
	if err := u.checkProxies(parse(t, "--proxy", "socks5://10.1.2.3", "--exclude", "10.0.0.0/8")); err != nil ||
		len(u.warnings) != 1 {
		t.Errorf("%v, %q", err, u.warnings)
	}
}
