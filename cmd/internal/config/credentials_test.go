package config

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/socks/sockstest"
)

// Each upstream has its own password, from the place that comes first.
func TestCredentials(t *testing.T) {
	file := func(dir, name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	dir := t.TempDir()
	one, two := file(dir, "one", "of-one\n"), file(dir, "two", "of-two\n")
	cred := t.TempDir()
	file(cred, "viasocks.password", "credential\n")
	file(cred, "viasocks.password.lab-1", "credential of lab\n")
	credentials := "CREDENTIALS_DIRECTORY=" + cred
	for _, tt := range []struct {
		args string
		env  []string
		want []string // passwords, in the order of the upstreams
		err  string
	}{
		{args: "--proxy socks5://al@h --password-file " + one, want: []string{"of-one"}},
		{args: "--proxy socks5://al@h --upstream lab-1=http://al@k --password-file lab-1=" + two + " --password-file " + one,
			want: []string{"of-one", "of-two"}},
		{args: "--proxy socks5://al@h --password-file proxy=" + one, want: []string{"of-one"}},
		{args: "--proxy socks5://al@h", env: []string{"VIASOCKS_PASSWORD=of-env", credentials}, want: []string{"of-env"}},
		{args: "--upstream lab-1=socks5://al@h", env: []string{"VIASOCKS_PASSWORD=no", "VIASOCKS_PASSWORD_LAB_1=of-env"},
			want: []string{"of-env"}},
		{args: "--proxy socks5://al@h --upstream lab-1=socks5://al@k", env: []string{credentials},
			want: []string{"credential", "credential of lab"}},
		{args: "--proxy socks5://al:x@h --upstream lab-1=socks5://k", env: []string{credentials}, want: []string{"x", ""}},
		{args: "--proxy socks4://al@h", env: []string{credentials}, want: []string{""}},
		{args: "--proxy socks5://al@h", env: []string{"CREDENTIALS_DIRECTORY=" + dir}, want: []string{""}},
		{args: "--proxy socks5://al@h --password-file " + one + " --password-file " + two, err: "has a password file already"},
		{args: "--proxy socks5://al@h --password-file lab=" + one, err: "there is no upstream lab"},
		{args: "--upstream lab=socks5://al@h --password-file " + one, err: "there is no --proxy"},
		{args: "--proxy socks5://h --password-file " + one, err: "names no user"},
		{args: "--proxy socks5://al:s3cret@h --password-file " + one, err: "has a password already"},
		{args: "--proxy socks4://al@h --password-file " + one, err: "SOCKS4 knows no passwords: remove it"},
		{args: "--proxy socks5://al@h", env: []string{"VIASOCKS_PASSWORD=" + strings.Repeat("s3cret", 50)},
			err: "cannot use VIASOCKS_PASSWORD"},
	} {
		c, err := Parse(Up, strings.Fields(tt.args), tt.env)
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) || strings.Contains(err.Error(), "s3cret") {
				t.Errorf("%s: %v, want %q", tt.args, err, tt.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", tt.args, err)
			continue
		}
		for i, u := range c.Upstreams {
			want := u.Server
			if tt.want[i] != "" {
				want, _ = want.WithCredentials("al", tt.want[i])
			}
			if !reflect.DeepEqual(u.Server, want) || u.Server.HasPassword() != (tt.want[i] != "") {
				t.Errorf("%s, %v: upstream %d has not the password %q", tt.args, tt.env, i, tt.want[i])
			}
		}
	}
}

func TestProxyCA(t *testing.T) {
	_, pem, err := sockstest.Certificate("h")
	if err != nil {
		t.Fatal(err)
	}
	good, bad := write(t, string(pem), 0o644), write(t, "s3cret", 0o644)
	c, err := Parse(Up, []string{"--proxy", "https://h", "--proxy-ca", good}, nil)
	if err != nil || c.Upstreams[0].Server.TLSConfig().RootCAs == nil {
		t.Errorf("not taken: %v", err)
	}
	if c, err = Parse(Up, []string{"--proxy", "https://h"}, nil); err != nil || c.Upstreams[0].Server.TLSConfig().RootCAs != nil {
		t.Errorf("not the system's: %v", err)
	}
	for _, path := range []string{bad, good + "x"} {
		if _, err := Parse(Up, []string{"--proxy", "https://h", "--proxy-ca", path}, nil); err == nil ||
			!strings.HasPrefix(err.Error(), "cannot ") {
			t.Errorf("%v", err)
		}
	}
}
