package config

import (
	"net/netip"
	"strings"
	"testing"
)

// imported gives the lines for files of these names and texts.
func imported(files ...string) ([]string, error) {
	im := newSocksImport()
	for i := 0; i < len(files); i += 2 {
		if err := im.read(files[i], []byte(files[i+1])); err != nil {
			return nil, err
		}
	}
	return im.lines()
}

// accepted reports what our own parser says of lines.
func accepted(lines []string) error {
	file, err := parseFile("import", []byte(strings.Join(lines, "\n")), Check)
	if err != nil {
		return err
	}
	c := blank()
	c.Command = Check
	return c.build(func(option string) []value { return file[option] }, nil, nil)
}

const group = " select=ordered connect-timeout=10s handshake-timeout=100s server-attempts=1 attempts=4 retry-after=300s " +
	"fail-threshold=2"

func TestImportSocks(t *testing.T) {
	five := "CONFIG proxy.config.socks.socks_version INT 5\n"
	words := func(sel string) string { return strings.Replace(group, "ordered", sel, 1) }
	for _, tt := range []struct {
		name  string
		files []string
		want  []string
	}{
		{"each line", []string{"records.config", five + "CONFIG proxy.config.http.x INT 1\n" +
			"CONFIG proxy.config.socks.server_connect_timeout INT 7\nCONFIG proxy.config.socks.socks_timeout INT 50\n" +
			"CONFIG proxy.config.socks.per_server_connection_attempts INT 2\n" +
			"CONFIG proxy.config.socks.connection_attempts INT 6\n" +
			"CONFIG proxy.config.socks.server_retry_time INT 60\nCONFIG proxy.config.socks.server_fail_threshold INT 3\n" +
			"CONFIG proxy.config.socks.default_servers STRING socks1.example:1080;10.0.0.2:4080\n"}, []string{
			"upstream ats=socks5://socks1.example:1080,socks5://10.0.0.2:4080 select=ordered connect-timeout=7s " +
				"handshake-timeout=50s " +
				"server-attempts=2 attempts=6 retry-after=60s fail-threshold=3",
			"rule via ats"}},
		{"socks.config", []string{"records.config", five, "socks.config",
			"# comment\nno_socks 10.1.0.0-10.1.255.255, 10.2.3.4 192.0.2.0/24\n" +
				"auth u al:ice geheim\ndest_ip=203.0.113.0-203.0.113.5 parent=\"s1:1080; s2:1081\" round_robin=strict\n" +
				"dest_ip=198.51.100.7 parent=s3:1080 round_robin=latched\n" +
				"dest_ip=198.51.100.8 parent=s3:1080 round_robin=true\n" +
				"dest_ip=198.51.100.9 parent=s3:1080,s3:1080 round_robin=false\ndest_ip=2001:db8::1 parent=[2001:db8::2]:1080\n"},
			[]string{
				"upstream ats1=socks5://al%3Aice@s1:1080,socks5://al%3Aice@s2:1081" + words("round-robin"), "password-file ats1",
				"upstream ats2=socks5://al%3Aice@s3:1080" + words("latched"), "password-file ats2",
				"upstream ats3=socks5://al%3Aice@s3:1080" + words("hash"), "password-file ats3",
				"upstream ats4=socks5://al%3Aice@s3:1080" + words("ordered"), "password-file ats4",
				"upstream ats5=socks5://al%3Aice@[2001:db8::2]:1080" + words("ordered"), "password-file ats5",
				"rule dst 10.1.0.0/16,10.2.3.4/32,192.0.2.0/24 direct", "rule dst 203.0.113.0/30,203.0.113.4/31 via ats1",
				"rule dst 198.51.100.7/32 via ats2", "rule dst 198.51.100.8/32 via ats3", "rule dst 198.51.100.9/32 via ats4",
				"rule dst 2001:db8::1/128 via ats5", "leave this line out", "rule direct"}},
		{"yaml", []string{"records.yaml", "records:\n  http:\n    socks: 1\n  socks: # of ours\n    socks_version: 5\n" +
			"    default_servers: \"h:1\" # one\n" +
			"    socks_timeout: 9\n  other:\n    socks_timeout: x\nsocks:\n  socks_timeout: y\n"}, []string{
			"upstream ats=socks5://h:1" + strings.Replace(group, "100s", "9s", 1), "rule via ats"}},
		{"defaults", []string{"r", "CONFIG proxy.config.socks.socks_needed INT 0\nCONFIG proxy.config.socks.colour INT 0\n" +
			"auth u a b\nCONFIG proxy.config.socks.default_servers STRING h:1"}, []string{
			"socks_needed is 0", "4 is Traffic Server's default", "auth is left out", "colour is not known",
			"upstream ats=socks4://h:1" + group, "rule via ats"}},
	} {
		got, err := imported(tt.files...)
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		if len(got) != len(tt.want) {
			t.Errorf("%s: %d lines:\n%s", tt.name, len(got), strings.Join(got, "\n"))
			continue
		}
		for i, w := range tt.want {
			if got[i] != w && !(strings.HasPrefix(got[i], "# ") && strings.Contains(got[i], w)) {
				t.Errorf("%s, line %d: got %q, want %q", tt.name, i+1, got[i], w)
			}
		}
		if s := strings.Join(got, "\n"); strings.Contains(s, "geheim") {
			t.Errorf("%s: shows the password:\n%s", tt.name, s)
		}
		if err := accepted(got); err != nil {
			t.Errorf("%s: our own parser says %v", tt.name, err)
		}
	}
}

func TestImportSocksErrors(t *testing.T) {
	for _, tt := range []struct{ file, text, want string }{
		{"s", "\n\nno_socks", "s:3: no_socks needs"},
		{"s", "no_socks 10.0.0.9-10.0.0.1", "s:1: \"10.0.0.9-10.0.0.1\" is not an address"},
		{"s", "no_socks 10.0.0.1-2001:db8::1", "is not an address"},
		{"s", "auth p a b", "must be auth u"},
		{"s", "auth u a geheim\nauth u c geheim", "s:2: auth is given twice"},
		{"s", "dest_ip=10.0.0.1", "parent is missing"},
		{"s", "parent=h:1", "dest_ip is missing"},
		{"s", "dest_ip=10.0.0.1 parent=h", "must be HOST:PORT"},
		{"s", "dest_ip=10.0.0.1 parent=u:p@h:1", "must be HOST:PORT"},
		{"s", "dest_ip=10.0.0.1 parent=\"h:1", "not closed"},
		{"s", "dest_ip=10.0.0.1 parent=h:1 round_robin=consistent_hash", "round_robin must be"},
		{"s", "dest_ip=10.0.0.1 parent=h:1 parent=i:1", "given twice"},
		{"s", "dest_domain=x parent=h:1", "cannot be carried over"},
		{"s", "# nothing", "there is no line"},
		{"s", strings.Repeat("a", maxLine+1), "longer than"},
		{"s", "a\x01", "control character"},
		{"s", "a\xff", "not UTF-8"},
		{"r", "CONFIG proxy.config.socks.connection_attempts INT 0",
			"r:1: proxy.config.socks.connection_attempts is attempts here, and must be a number from 1 to 100"},
		{"r", "CONFIG proxy.config.socks.socks_timeout INT x", "must be a number"},
		{"r", "CONFIG proxy.config.socks.socks_version INT 6", "must be 4 or 5"},
		{"r", "CONFIG proxy.config.socks.default_servers STRING h",
			"r:1: proxy.config.socks.default_servers: \"h\" must be HOST:PORT"},
		{"r", "CONFIG proxy.config.socks.socks_timeout INT 1\nCONFIG proxy.config.socks.socks_timeout INT 2", "given twice"},
		{"r.yaml", "records:\n  socks:\n    - a", "r.yaml:3: must be NAME: VALUE"},
	} {
		_, err := imported(tt.file, tt.text)
		if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "geheim") {
			t.Errorf("%q: %v, want %q", tt.text, err, tt.want)
		}
	}
	if _, err := imported("s", strings.Repeat("no_socks ::1-ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe\n", 100)); err == nil ||
		!strings.Contains(err.Error(), "more than") {
		t.Errorf("%v", err)
	}
}

func TestRangeNetworks(t *testing.T) {
	for _, tt := range []struct{ first, last, want string }{
		{"0.0.0.0", "255.255.255.255", "0.0.0.0/0"},
		{"10.0.0.1", "10.0.0.6", "10.0.0.1/32 10.0.0.2/31 10.0.0.4/31 10.0.0.6/32"},
		{"255.255.255.254", "255.255.255.255", "255.255.255.254/31"},
		{"2001:db8::", "2001:db8::ffff", "2001:db8::/112"},
	} {
		var got []string
		for _, p := range rangeNetworks(netip.MustParseAddr(tt.first), netip.MustParseAddr(tt.last)) {
			got = append(got, p.String())
		}
		if s := strings.Join(got, " "); s != tt.want {
			t.Errorf("%s-%s: %s", tt.first, tt.last, s)
		}
	}
}

// What is imported without an error is taken by our own parser, and never holds the password.
func FuzzImportSocks(f *testing.F) {
	f.Add(
		"socks.config",
		"no_socks 10.1.0.0-10.1.255.255\nauth u al hunter2hunter2\n"+
			"dest_ip=203.0.113.0-203.0.113.5 parent=\"s1:1080;s2:1081\" round_robin=strict\n"+
			"CONFIG proxy.config.socks.socks_version INT 5\n",
	)
	f.Add("records.yaml", "records:\n  socks:\n    socks_version: 5\n    default_servers: \"h:1\" # one\n    socks_timeout: 9\n")
	f.Add("s", "dest_ip=::-ffff:: parent=[::1%25lo]:1\n")
	f.Fuzz(func(t *testing.T, name, text string) {
		lines, err := imported(name, text)
		if err != nil {
			return
		}
		if err := accepted(lines); err != nil {
			t.Errorf("%v\n%s", err, strings.Join(lines, "\n"))
		}
		if strings.Contains(strings.Join(lines, "\n"), "hunter2hunter2") && strings.Contains(text, "auth u al hunter2hunter2") &&
			strings.Count(text, "hunter2hunter2") == 1 {
			t.Error("the password is shown")
		}
	})
}
