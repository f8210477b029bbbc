package config

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/tun"
)

const proxyFlag = "--proxy=socks5://127.0.0.1"

func TestDefaults(t *testing.T) {
	c, err := Parse(Run, []string{proxyFlag, "prog", "--mtu", "x", "-v"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(c.Program, " "); got != "prog --mtu x -v" {
		t.Errorf("the program is %q: its flags are its own", got)
	}
	if c.Default != DefaultUpstream || len(c.Upstreams) != 1 || c.Upstreams[0].Server.String() != "socks5://127.0.0.1:1080" {
		t.Errorf("upstreams %v, default %q", c.Upstreams, c.Default)
	}
	if !c.Fake.On {
		t.Error("names do not become fake addresses")
	}
	want := "[tcp://1.1.1.1:53 tcp://9.9.9.9:53]"
	if fmt.Sprint(c.DNS) != want {
		t.Errorf("DNS %v", c.DNS)
	}
	if c.MTU != 1500 || c.IdleTimeout != 2*time.Hour || c.Offload != tun.OffloadFull || c.LogLevel != slog.LevelWarn {
		t.Errorf("%+v", c)
	}
	c, err = Parse(Up, []string{proxyFlag}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if c.LogLevel != slog.LevelInfo || c.Mark != 0x76000000 || c.Mask != 0xff000000 || c.Table != 30323 || c.TUN != "viasocks0" {
		t.Errorf("%+v", c)
	}
}

func TestProgramAfterDashes(t *testing.T) {
	c, err := Parse(Run, []string{proxyFlag, "--", "--mtu", "9"}, nil)
	if err != nil || strings.Join(c.Program, " ") != "--mtu 9" {
		t.Errorf("%v, %v", c, err)
	}
}

// usageErrorsCases are the cases of TestUsageErrors.
var usageErrorsCases = []struct{ args, want string }{
	{"--prxy x", "cannot use --prxy: there is no such option (did you mean --proxy?)"},
	{"--frobnicate x", "cannot use --frobnicate: there is no such option"},
	{"-x", "cannot use -x: options begin with two hyphens"},
	{"--proxy", "cannot use --proxy: its value is missing, as in --proxy URL"},
	{"--takeover", "cannot use --takeover: this command does not take it"},
	{"", "no proxy was given: use --proxy socks5://HOST:PORT, or set VIASOCKS_PROXY"},
	{"--proxy ftp://h:1", "cannot use --proxy ftp://h:1: it must begin with socks5://"},
	{"--proxy socks5://al:s3cr3t@h:99999", "cannot use --proxy socks5://al:***@h:99999: it must read SCHEME://"},
	{"--proxy socks5://al:s3cr3t@s3cr3t@h:x", "cannot use --proxy socks5://al:***@h:x: it must"},
	{"--proxy al:s3cr3t@h", "cannot use --proxy al:***@h: it must"},
	{"--proxy=socks5://al:a%20s3cr3t/%zz@h", "cannot use --proxy socks5://al:***@h: it must"},
	{"--=socks5://al:s3cr3t@h", "bad flag syntax: --=socks5://al:***@h"},
	{"P --upstream b=socks5://al:s3cr3t@", "cannot use --upstream b=socks5://al:***@: it must"},
	{"P --upstream b", "must be NAME=URL"},
	{"P --upstream proxy=socks5://h", "the name proxy is taken"},
	{"P --upstream direct=socks5://h", "the name direct is taken"},
	{"P --upstream b=socks5://h --upstream b=socks5://h", "there is already an upstream b"},
	{"P --upstream b=socks5://h,socks5://h", "is named twice"},
	{"P --rule=proto\ticmp\tdrop", `cannot use --rule proto icmp drop: protocol "icmp": write tcp or udp`},
	{"P --rule drop,", "unknown word"},
	{"P --rule=via\tb", `cannot use rule "via b": there is no upstream b, only proxy`},
	{"P --dns 1.1.1.1", "must be off, or one or several of fake"},
	{"P --dns fakes", "must be off, or one or several of fake"},
	{"P --dns fake,1.1.1.1", "must be off, or one or several of fake"},
	{"--rule direct --dns fake", "cannot use --dns fake without a proxy"},
	{"P --dns-pool 198.20.0.0/16", "inside 198.18.0.0/15"},
	{"P --dns-pool6 fd00::/65", "a /64 or wider"},
	{"P --dns-pool6 fd00::1/64", "a /64 or wider"},
	{"P --dns-pool6 2001:db8::/48", "inside fd00::/8"},
	{"P --dns-pool6 fc00::/7", "inside fd00::/8"},
	{"P --dns-pool6 198.18.0.0/15", "inside fd00::/8"},
	{"P --dns tcp://198.18.0.2 --dns fake,tcp://198.18.0.2", "whose addresses stand for names"},
	{"P --dns fake,tcp://[fd76:6961:736f:636b::9]", "whose addresses stand for names"},
	{"P --dns-pool6 fd77::/48 --dns fake,tcp://[fd77:0:0:1::9]", "whose addresses stand for names"},
	{"P --dns-pool 198.0.0.0/8", "inside 198.18.0.0/15"},
	{"P --dns-pool 198.18.0.0/24", "of 512 addresses at least"},
	{"P --dns-pool 198.18.0.1/16", "inside 198.18.0.0/15"},
	{"P --ipv6 yes", "must be auto, on or off"},
	{"P --dns relay,fake", "must be off, or one or several of fake"},
	{"P --dns tor", "cannot use --dns tor: --proxy has no server that is a Tor"},
	{"P --dns fake,tor,1.1.1.1", "must be off, or one or several of fake"},
	{"--rule direct --dns tor", "cannot use --dns tor: --proxy has no server that is a Tor"},
	{"P --dns off,tcp://1.1.1.1", "must be off, or one or several of fake"},
	{"P --dns relay,,tcp://1.1.1.1", "must be off, or one or several of fake"},
	{"P --dns tcp://one.1", `"tcp://one.1" has no usable address or host name`},
	{"P --dns https://one.one", `"https://one.one" has no path`},
	{"P --dns tls://1.1.1.1,one.one#x", `"tls://one.one#x" has two names`},
	{"P --dns tcp://1.1.1.1,udp://1.0.0.1", `"udp://1.0.0.1" is not a resolver`},
	{"P --dns tcp://0.0.0.0", "has no usable address"},
	{"P --mtu 0", "cannot use --mtu 0: must be a number from 1280 to 65535"},
	{"P --mtu -1", "must be a number from"},
	{"P --max-pending 0", "must be a number from 1 to 1000000"},
	{"P --max-pending 10", "cannot use --max-pending-per-destination 256: more than --max-pending 10"},
	{"P --max-mappings 1e3", "must be a number"},
	{"P --connect-timeout 0", "must be from 100ms to 5m"},
	{"P --connect-timeout -1s", "must be from 100ms to 5m"},
	{"P --handshake-timeout 30", "must be a time like 30s or 5m"},
	{"P --idle-timeout 24h", "must be from 10s to 9h"},
	{"P --udp-timeout 1s", "must be from 10s to 24h"},
	{"P --sniff yes", "must be off, rules or name"},
	{"P --sniff-port 0", `"0" is not a port`},
	{"P --sniff-port 80,", `"" is not a port`},
	{"P --sniff-port 53", "port 53 is always viasocks'"},
	{"P --ping 0", `"0" is not a port`},
	{"P --ping 443,", `"" is not a port`},
	{"P --ping 53", "viasocks answers it"},
	{"P --ping 1,2,3,4,5,6,7,8,9", "more than 8 ports"},
	{"P --sniff-wait 1ms", "must be from 10ms to 10s"},
	{"P --sniff rules --allow tcp:example.com:443", "cannot use --sniff rules with --allow"},
	{"P --offload half", "must be full, nouso or off"},
	{"P --udp-gso yes", "must be auto, on or off"},
	{"P --pipeline yes", "must be auto, on or off"},
	{"P --pool -1", "must be a number from 0 to 1024"},
	{"P --pool-age 0", "must be from 1s to 1h"},
	{"P --keep-proxy-env=maybe", "cannot use --keep-proxy-env=maybe: must be true or false"},
	{"P --log-level loud", "must be debug, info, warn or error"},
	{"P --password-file /dev/null", "the proxy's URL names no user"},
	{"--proxy socks5://al:s3cr3t@h --password-file /dev/null", "the proxy's URL has a password already"},
	{"P --tun a/b", "must be 1 to 15 bytes"},
	{"P --tun lo", "and not lo"},
	{"P --mark 0", "must be a number other than 0"},
	{"P --mark 0x100/0xff", "and a mask that covers it"},
	{"P --table 254", "but not 253, 254 and 255"},
	{"P --table main", "must be a number"},
	{"P --config /dev/null --config", "cannot use --config: its value is missing, as in --config FILE"},
	{"P word", `cannot use "word": unexpected argument`},
}

// Each row is wrong, and the message says so without the secret.
func TestUsageErrors(t *testing.T) {
	const secret = "s3cr3t"
	for _, tt := range usageErrorsCases {
		args := strings.Fields(tt.args)
		if strings.Contains(tt.args, "\t") {
			args = strings.Split(strings.ReplaceAll(tt.args, "\t", "\x00"), " ")
			for i := range args {
				args[i] = strings.ReplaceAll(args[i], "\x00", " ")
			}
		}
		if len(args) > 0 && args[0] == "P" {
			args[0] = proxyFlag
		}
		_, err := Parse(Check, args, nil)
		var usage *UsageError
		if !errors.As(err, &usage) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: got %v, want %q", tt.args, err, tt.want)
			continue
		}
		if strings.Contains(err.Error(), secret) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: shows the secret, or more than a line: %v", tt.args, err)
		}
	}
	for _, args := range [][]string{{proxyFlag}, {proxyFlag, "--"}, {proxyFlag, ""}} {
		if _, err := Parse(Run, args, nil); err == nil || err.Error() != "cannot run: no program was given" {
			t.Errorf("%q: %v", args, err)
		}
	}
	if _, err := Parse(Run, []string{"--tun", "x", "p"}, nil); err == nil {
		t.Error("run takes --tun")
	}
	if _, err := Parse(Run, []string{"--help"}, nil); !errors.Is(err, ErrHelp) {
		t.Error(err)
	}
}

func TestProxyFromEnvironment(t *testing.T) {
	for _, tt := range []struct {
		env  []string
		want string // or an error
	}{
		{[]string{"VIASOCKS_PROXY=socks5://a", "ALL_PROXY=socks5://b"}, "socks5://a:1080"},
		{[]string{"all_proxy=socks5h://c:1", "ALL_PROXY=http://b"}, "socks5h://c:1"},
		{[]string{"ALL_PROXY=SOCKS5://b:2"}, "socks5://b:2"},
		{[]string{"ALL_PROXY=http://b"}, "no proxy was given"},
		{[]string{"VIASOCKS_PROXY=ftp://b"}, "cannot use VIASOCKS_PROXY=ftp://b: it must begin with"},
		{[]string{"ALL_PROXY=socks4://u:pw@b"}, "cannot use ALL_PROXY=socks4://u:***@b: SOCKS4 knows no passwords: remove it"},
		{[]string{"ALL_PROXY=socks://127.0.0.1:1080/"}, "socks5://127.0.0.1:1080"}, // as GNOME writes it
		{[]string{"all_proxy=socks://b"}, "socks5://b:1080"},
		{[]string{"VIASOCKS_PROXY="}, "no proxy was given"},
	} {
		c, err := Parse(Up, nil, tt.env)
		got := fmt.Sprint(err)
		if err == nil {
			got = c.Upstreams[0].Server.String()
		}
		if !strings.HasPrefix(got, tt.want) {
			t.Errorf("%q: got %q, want %q", tt.env, got, tt.want)
		}
	}
}

func TestUpstreamsAlone(t *testing.T) {
	c, err := Parse(Up, []string{"--upstream", "a=socks5://h", "--rule", "port 80 via a"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if c.Default != "" || len(c.Rules) != 1 || c.Upstreams[0].Name != "a" {
		t.Errorf("without --proxy there must be no default: %+v", c)
	}
}

func write(t *testing.T, content string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestPasswordFile(t *testing.T) {
	parse := func(content string, mode os.FileMode) (*Config, error) {
		return Parse(Up, []string{"--proxy", "socks5://al@h", "--password-file", write(t, content, mode)}, nil)
	}
	c, err := parse("s3cr3t word\r\nrest\n", 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if want, _ := c.Upstreams[0].Server.WithCredentials("al", "s3cr3t word"); !reflect.DeepEqual(c.Upstreams[0].Server, want) {
		t.Error("not the password of the file")
	}
	if s := fmt.Sprintf("%+v %#v", c, c); strings.Contains(s, "s3cr3t") {
		t.Errorf("a printed Config shows the password: %s", s)
	}
	if len(c.Warnings) != 0 {
		t.Error(c.Warnings)
	}
	if c, err := Parse(Up, []string{"--proxy", "socks5://al:s3cr3t@h", "--upstream", "b=socks5://al:s3cr3t@h"}, nil); err != nil {
		t.Error(err)
	} else if s := fmt.Sprintf("%+v %#v", c, c); strings.Contains(s, "s3cr3t") {
		t.Errorf("a printed Config shows the password: %s", s)
	}
	if c, err := parse("\ufeffs3cr3t word\n", 0o600); err != nil {
		t.Error(err)
	} else if want, _ := c.Upstreams[0].Server.WithCredentials("al", "s3cr3t word"); !reflect.DeepEqual(c.Upstreams[0].Server,
		want) {
		t.Error("the byte order mark is part of the password")
	}
	if c, err := parse("x", 0o644); err != nil || len(c.Warnings) != 1 || !strings.Contains(c.Warnings[0], "chmod 600") {
		t.Errorf("%v, %v", c, err)
	}
	for _, content := range []string{"", "\nx", strings.Repeat("x", 256), strings.Repeat("x", 1000)} {
		if _, err := parse(content, 0o600); err == nil || errors.As(err, new(*UsageError)) ||
			!strings.HasPrefix(err.Error(), "cannot use the password file ") {
			t.Errorf("%d bytes: %v", len(content), err)
		}
	}
	if _, err := parse("\ufeff"+strings.Repeat("x", 255)+"\r\n", 0o600); err != nil {
		t.Error(err)
	}
	_, err = Parse(Up, []string{"--proxy", "socks5://al@h", "--password-file", "/does/not/exist"}, nil)
	if err == nil || err.Error() != "cannot read the password file /does/not/exist: no such file or directory" {
		t.Error(err)
	}
}

func TestFile(t *testing.T) {
	path := write(t, `# the house proxy
proxy socks5://10.0.0.1:1080   # with a comment
  mtu = 9000
rule dst 10.0.0.0/8 direct
rule=port 25 reject
keep-proxy-env
table 77
log-level debug
`, 0o600)
	c, err := Parse(Run, []string{"--config", path, "--log-level", "error", "p"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if c.MTU != 9000 || len(c.Rules) != 2 || !c.KeepProxyEnv || c.LogLevel != slog.LevelError || c.Table != 0 {
		t.Errorf("%+v", c)
	}
	c, err = Parse(Up, []string{"--config", path, "--rule", "drop"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Rules) != 1 || c.Rules[0].String() != "drop" || c.Table != 77 {
		t.Errorf("flags must replace the file's list: %+v", c)
	}
	if _, err := Parse(Up, []string{"--config", "/does/not/exist"}, nil); err == nil ||
		err.Error() != "cannot read the configuration file /does/not/exist: no such file or directory" {
		t.Error(err)
	}
	if _, err := Parse(Up, []string{"--config", t.TempDir()}, nil); err == nil ||
		!strings.HasSuffix(err.Error(), "it is a directory") {
		t.Error(err)
	}
}

// Some editors begin a file with a byte order mark, and end lines as Windows does.
func TestFileOfOtherEditors(t *testing.T) {
	c, err := Parse(Up, []string{"--config", write(t, "\ufeffproxy socks5://h\r\nmtu 1400\r\n", 0o600)}, nil)
	if err != nil || c.MTU != 1400 {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestFileErrors(t *testing.T) {
	for _, tt := range []struct{ file, want string }{
		{"mtu 9", ":1: mtu 9: must be a number from 1280 to 65535"},
		{"\n\nfoo bar", `:3: unknown option "foo"`},
		{"prox socks5://h", `:1: unknown option "prox" (did you mean proxy?)`},
		{"--mtu 1500", `:1: "--mtu": write the option without the dashes`},
		{"mtu", ":1: mtu needs a value: BYTES"},
		{"mtu 1500\nmtu 1500", ":2: mtu was given before"},
		{"config x", ":1: a configuration file cannot include another one"},
		{"proxy socks5://al:s3cr3t@h:x", ":1: proxy socks5://al:***@h:x: it must read"},
		{"al:s3cr3t@h", `:1: unknown option "al:***@h"`},
		{"mtu 1500\x00", ":1: there is a control character in the line"},
		{"mtu 15\xff", ":1: not UTF-8 text"},
		{strings.Repeat("#", maxLine+1), ":1: the line is longer than 4096 bytes"},
		{strings.Repeat("#\n", maxFile/2+1), "longer than 1048576 bytes"},
	} {
		_, err := Parse(Up, []string{proxyFlag, "--config", write(t, tt.file, 0o600)}, nil)
		if proxyIsTheTest := strings.HasPrefix(tt.file, "proxy"); proxyIsTheTest {
			_, err = Parse(Up, []string{"--config", write(t, tt.file, 0o600)}, nil)
		}
		if !errors.As(err, new(*UsageError)) || !strings.Contains(err.Error(), tt.want) ||
			strings.Contains(err.Error(), "s3cr3t") {
			t.Errorf("%.40q: got %v, want %q", tt.file, err, tt.want)
		}
	}
}

func TestRedact(t *testing.T) {
	for in, want := range map[string]string{
		"use --proxy socks5://USER@h:1 with":      "use --proxy socks5://USER@h:1 with",
		"a socks5://u:p@h:1, b=socks5://u:p@q@h.": "a socks5://u:***@h:1, b=socks5://u:***@h.",
		"u:p@h": "u:***@h",
		"it must read socks5://[user[:password]@]host": "it must read socks5://[user[:password]@]host",
		"socks5://:p@h":           "socks5://:***@h",
		"socks5://u@x:p@h":        "socks5://u@x:***@h",
		"x.conf:3: socks5://u@h:": "x.conf:3: socks5://u@h:",
	} {
		if got := Redact(in); got != want {
			t.Errorf("%q became %q, want %q", in, got, want)
		}
	}
}

func FuzzFile(f *testing.F) {
	for _, s := range []string{"mtu 1500\n# x\nrule=port 25 reject", "keep-proxy-env", "proxy socks5://u:p@h:1 #", "=",
		"dns=tcp://1.1.1.1,::1"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := parseFile("f", b, Check)
		if err != nil && strings.Contains(err.Error(), "\n") {
			t.Fatalf("the error has lines: %q", err)
		}
		for name, vs := range got {
			if o := find(name); o == nil || len(vs) > 1 && !o.Many {
				t.Fatalf("%q: %q", name, vs)
			}
		}
		if err == nil {
			c := &Config{Command: Check}
			_ = c.build(func(option string) []value { return got[option] }, nil, nil)
		}
	})
}

func FuzzRedact(f *testing.F) {
	for _, s := range []string{"a://u:pw", "b=socks5://u:a@b", "u:pw", "https://h:1/x://u:p", "\xff\"'"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		start, end, ok := secret(s + "@h")
		if !ok {
			return
		}
		if q := quote(s + "@h"); !strings.HasPrefix(q, (s + "@h")[:start]) || !strings.HasSuffix(q, "***@h") || end > len(s) {
			t.Fatalf("%q became %q", s, q)
		}
	})
}

// Again keeps what a reload does not take, says so, and takes the rest; how a value is written does not matter.
func TestAgain(t *testing.T) {
	path := write(t, "proxy socks5://h\nmtu 1400\nmark 0x100/0xff00\nmax-mappings 9\nfail-open\n", 0o600)
	args := []string{"--config", path, "--table", "77"}
	first, err := Parse(Up, args, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ file, restart string }{
		{"proxy socks5://i\nmtu 1400\nmark 256/0xff00\nfail-open true\n", ""},
		{"proxy socks5://i\nmark 0x200/0xff00\nfail-open\ncontrol-group 0\n", "control-group mark mtu"},
		{"proxy socks5://i\nmtu=1400\nmark 256/0xff00\nlan carry\ntable 78", "fail-open"}, // --table wins over the file
	} {
		if err := os.WriteFile(path, []byte(tt.file), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := first.Again(args, nil)
		if err != nil {
			t.Fatal(err)
		}
		slices.Sort(c.NeedRestart)
		if got := strings.Join(c.NeedRestart, " "); got != tt.restart {
			t.Errorf("%q: needs a restart for %q, want %q", tt.file, got, tt.restart)
		}
		if c.MTU != 1400 || c.Mark != 0x100 || !c.Host.FailOpen || c.Host.ControlGroup != -1 || c.Table != 77 {
			t.Errorf("%q: what needs a restart changed: %+v", tt.file, c)
		}
		if c.MaxMappings != 0 || c.Upstreams[0].Server.Host() != "i" {
			t.Errorf("%q: not taken: %+v", tt.file, c)
		}
	}
	if err := os.WriteFile(path, []byte("proxy socks5://i\nmtu 9\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := first.Again(args, nil); err == nil || !strings.Contains(err.Error(), "mtu 9: must be") {
		t.Errorf("a wrong value of an option that needs a restart: %v", err)
	}
}

// Who may write the configuration decides where everything goes: it is said of the file, and of its directory.
func TestWhoMayWrite(t *testing.T) {
	for _, tt := range []struct {
		file, dir os.FileMode
		uid, gid  int // -1: the caller's
		want      string
	}{
		{0o600, 0o755, -1, -1, ""},
		{0o644, 0o755, -1, -1, ""},
		{0o664, 0o755, -1, -1, ""}, // the group is the caller's own
		{0o666, 0o755, -1, -1, "everybody can change the configuration file"},
		{0o602, 0o755, -1, -1, "everybody can change"},
		{0o644, 0o777, -1, -1, "everybody can replace the configuration file"},
		{0o644, 0o777 | os.ModeSticky, -1, -1, ""},
		{0o644, 0o755, 4321, -1, "user 4321 can change"},
		{0o664, 0o755, -1, 4321, "group 4321 can change"},
	} {
		path := write(t, proxyFlag[2:]+"\n", tt.file)
		if (tt.uid >= 0 || tt.gid >= 0) && os.Getuid() != 0 {
			continue
		}
		if err := os.Chown(path, tt.uid, tt.gid); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Dir(path), tt.dir); err != nil {
			t.Fatal(err)
		}
		for _, cmd := range []Command{Check, Up} {
			c, err := Parse(cmd, []string{"--config", path}, nil)
			if err != nil {
				t.Fatal(err)
			}
			got := strings.Join(c.Warnings, "; ")
			if (got == "") != (tt.want == "") || !strings.Contains(got, tt.want) {
				t.Errorf("%v in %v of %d:%d: %q, want %q", tt.file, tt.dir, tt.uid, tt.gid, got, tt.want)
			}
		}
	}
}
