package socks

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseServer(t *testing.T) {
	tests := []struct {
		url, want, user, pass string
	}{
		{"socks5://10.0.0.1:1080", "socks5://10.0.0.1:1080", "", ""},
		{"socks5://10.0.0.1", "socks5://10.0.0.1:1080", "", ""},
		{"SOCKS5://proxy.example:9/", "socks5://proxy.example:9", "", ""},
		{"socks5h://[2001:db8::1]:1081", "socks5h://[2001:db8::1]:1081", "", ""},
		{"socks5://[fe80::1%25eth0]:1081", "socks5://[fe80::1%25eth0]:1081", "", ""},
		{"socks5://[fe80::1%eth0]:1081", "socks5://[fe80::1%25eth0]:1081", "", ""},
		{"socks://127.0.0.1:1080/", "socks5://127.0.0.1:1080", "", ""},
		{"SOCKS://al@127.0.0.1", "socks5://127.0.0.1:1080", "al", ""},
		{"socks5://alice@h:1", "socks5://h:1", "alice", ""},
		{"socks5://alice:s%40e%3Ac%2Fret@h:1", "socks5://h:1", "alice", "s@e:c/ret"},
	}
	for _, tt := range tests {
		s, err := ParseServer(tt.url)
		if err != nil || s.String() != tt.want || s.User() != tt.user || s.HasCredentials() != (tt.user != "") {
			t.Errorf("%s: %v, user %q, %v", tt.url, s, s.User(), err)
			continue
		}
		if s.login != nil && s.login.pass != tt.pass {
			t.Errorf("%s: password %q", tt.url, s.login.pass)
		}
	}
}

func TestParseServerRefuses(t *testing.T) {
	for _, url := range []string{
		"", "10.0.0.1:1080", "hunter2", "socks5:", "socks5://", "socks5://:1080", "socks5://h:0", "socks5://h:65536",
		"socks5://h:x",
		"socks5://h:1/path", "socks5://h:1?q=hunter2", "socks5://h:1#hunter2", "socks5://alice:hunter2/x@h:1",
		"socks5://alice:hunter2#@h:1",
		"socks5://alice:hunter2%zz@h:1", "socks5://:hunter2@h:1", "socks5://a:" + strings.Repeat("hunter2", 40) + "@h:1",
		"socks5://" + strings.Repeat("h", 256), "hunter2://h:1", "socks5:hunter2",
		"socks5://2001:db8::1", "socks5://[fe80::1]:1080", "socks5://a:hunter2%zz@[fe80::1%eth0]", "socks5://a:[hunter2%41]@h",
		"socks5://::1:1080", "socks5://h:1:2",
	} {
		s, err := ParseServer(url)
		if err == nil {
			t.Errorf("%s is taken as %v", url, s)
		} else if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("the error repeats what may be a password: %v", err)
		} else if !strings.HasPrefix(err.Error(), "cannot ") {
			t.Errorf("%v", err)
		}
	}
}

// TestCredentialsAreNotPrinted prints a Server, a Client and an error in every way at hand.
func TestCredentialsAreNotPrinted(t *testing.T) {
	s, err := ParseServer("socks5://alice:hunter2@10.0.0.1:1080")
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	c := &Client{server: s}
	for _, v := range []any{s, &s, c, []Server{s}, struct{ hidden Server }{s},
		&ServerError{s.String(), OpConnect, ErrCredentials}} {
		fmt.Fprintf(&out, "%v %+v %#v %s\n", v, v, v, v)
		json.NewEncoder(&out).Encode(v)
		slog.New(slog.NewTextHandler(&out, nil)).Info("x", "v", v)
		slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "v", v)
	}
	for _, secret := range []string{"hunter2", "alice"} {
		if strings.Contains(out.String(), secret) {
			t.Errorf("%q in:\n%s", secret, out.String())
		}
	}
	if !strings.Contains(out.String(), "socks5://10.0.0.1:1080") {
		t.Errorf("the server is not named in:\n%s", out.String())
	}
}

// A zone is the name of a device or its number, as for package net, which looks first whether the proxy is there.
func TestZone(t *testing.T) {
	for _, tt := range []struct {
		at   string
		want uint32
	}{{"[fe80::1%lo]:1", 1}, {"[fe80::1%1]:1", 1}, {"[fe80::1%77]:1", 77}, {"[2001:db8::1]:1", 0}, {"[fe80::1%none]:1", 0},
		{"[fe80::1%0]:1", 0}} {
		var sa sockaddrRoom
		err := sa.set(netip.MustParseAddrPort(tt.at))
		if (err != nil) != (tt.want == 0 && strings.Contains(tt.at, "%")) {
			t.Errorf("%s: %v", tt.at, err)
		} else if err == nil && (sa.domain() != unix.AF_INET6 || sa.raw.Scope_id != tt.want) {
			t.Errorf("%s: %+v", tt.at, sa)
		}
	}
}
