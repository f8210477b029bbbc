package config

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/cmd/internal/incoming"
	"github.com/viasocks/viasocks/route/portmap"
	"github.com/viasocks/viasocks/socks"
)

func TestListen(t *testing.T) {
	for _, tt := range []struct {
		args, err string
		want      []incoming.Spec
	}{
		{args: "--proxy socks5://h --listen 6881 --listen 6882/tcp=proxy",
			want: []incoming.Spec{{Port: 6881}, {Port: 6882, Upstream: "proxy", Proto: portmap.TCP}}},
		{args: "--proxy socks5://h --listen 6881 --listen 6881", err: "given twice"},
		{args: "--proxy socks5://h --listen 6881=far", err: "there is no upstream far"},
		{args: "--upstream a=socks5://h --listen 6881", err: "without --proxy"},
		{
			args: "--proxy socks5://h --listen 6881/udp --listen 6881",
			want: []incoming.Spec{{Port: 6881, Proto: portmap.UDP}, {Port: 6881}},
		},
		{args: "--proxy socks5://h --listen 6881/tcp --listen 6881", err: "given twice"},
		{args: "--proxy socks5://h --listen 6881 --on-port /", err: "is no program"},
		{args: "--proxy socks5://h --listen 6881 --on-port /nonexistent", err: "no such file"},
	} {
		c, err := Parse(Run, append(strings.Fields(tt.args), "--", "true"), nil)
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%s: %v, want %q", tt.args, err, tt.err)
			}
			continue
		}
		if err != nil || len(c.Listen) != len(tt.want) {
			t.Errorf("%s: %v", tt.args, err)
			continue
		}
		for i, s := range tt.want {
			if c.Listen[i] != s {
				t.Errorf("%s: %v", tt.args, c.Listen)
			}
		}
	}
}

// With up, a program must ask for its UDP port: it is not known before from which address it sends.
func TestListenUDPUp(t *testing.T) {
	if _, err := Parse(Up, strings.Fields("--proxy socks5://192.0.2.1 --listen 6881/udp"), nil); err == nil ||
		!strings.Contains(err.Error(), "--listen 6881 allows that") {
		t.Errorf("%v", err)
	}
	c, err := Parse(Up, strings.Fields("--proxy socks5://192.0.2.1 --listen 6881 --stun 203.0.113.9:3478"), nil)
	if err != nil || len(c.STUN) != 1 || len(c.Warnings) != 0 {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestSTUN(t *testing.T) {
	for _, tt := range []struct {
		value, err string
		want       []socks.Addr
	}{
		{value: "203.0.113.9:3478,Stun.Example.:3479",
			want: []socks.Addr{{IP: netip.MustParseAddr("203.0.113.9"), Port: 3478}, {Name: "stun.example", Port: 3479}}},
		{value: "203.0.113.9", err: "HOST:PORT"},
		{value: "203.0.113.9:0", err: "HOST:PORT"},
		{value: ":3478", err: "HOST:PORT"},
		{value: "[2001:db8::1]:3478", err: "IPv4"},
		{value: "a:1,a:1", err: "given twice"},
		{value: "a:1,b:1,c:1", err: "more than 2"},
	} {
		c, err := Parse(Run, []string{"--proxy", "socks5://h", "--listen", "auto", "--stun", tt.value, "--", "true"}, nil)
		switch {
		case tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)):
			t.Errorf("%s: %v, want %q", tt.value, err, tt.err)
		case tt.err == "" && (err != nil || !slices.Equal(c.STUN, tt.want)):
			t.Errorf("%s: %v, %v", tt.value, c, err)
		}
	}
}

func TestForwardedPort(t *testing.T) {
	for _, tt := range []struct{ args, err string }{
		{"--forwarded-port 50000", ""},
		{"--forwarded-port 203.0.113.9:50000/tcp --forwarded-port 50000/udp", ""},
		{"--forwarded-port 50000 --forwarded-port 50000/udp", "given twice"},
		{"--forwarded-port 0", "1 to 65535"},
		{"--forwarded-port 50000/sctp", "not tcp or udp"},
		{"--forwarded-port [2001:db8::1]:50000", "no IPv4 address"},
		{"--forwarded-port 0.0.0.0:50000", "nobody can connect to 0.0.0.0"},
		{"--forwarded-port 127.0.0.1:50000", "nobody can connect to 127.0.0.1"},
		{"--forwarded-port 239.255.255.250:50000", "nobody can connect to 239.255.255.250"},
		{"--forwarded-port 255.255.255.255:50000", "nobody can connect to 255.255.255.255"},
	} {
		c, err := Parse(Run, append(strings.Fields("--proxy socks5://h "+tt.args), "--", "true"), nil)
		switch {
		case tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)):
			t.Errorf("%s: %v, want %q", tt.args, err, tt.err)
		case tt.err == "" && (err != nil || !c.Gateway()):
			t.Errorf("%s: %v", tt.args, err)
		}
	}
}

func TestPublishTwice(t *testing.T) {
	for args, ok := range map[string]bool{
		"--publish 8080 --publish 127.0.0.1:8080:80":        false,
		"--publish 8080:80/udp --publish 8080:81/udp":       false,
		"--publish-unix /run/a:80 --publish-unix /run/a:81": false,
		"--publish 8080 --publish 8080/udp":                 true,
		"--publish 8080 --publish [::1]:8080":               true,
		"--publish 0:80 --publish 0:81":                     true,
		"--publish-unix /run/a:80 --publish-unix /run/b:80": true,
	} {
		_, err := Parse(Run, append(strings.Fields("--proxy socks5://h "+args), "--", "true"), nil)
		if ok != (err == nil) || !ok && !strings.Contains(err.Error(), "another port of the program is published there, too") {
			t.Errorf("%s: %v", args, err)
		}
	}
}

// An option that does nothing without another one says so.
func TestMembersExcludeAlone(t *testing.T) {
	for args, warnings := range map[string]int{"--members-exclude": 1, "--members-exclude --control-group 0": 0} {
		c, err := Parse(Up, strings.Fields("--proxy socks5://192.0.2.1 "+args), nil)
		if err != nil || len(c.Warnings) != warnings {
			t.Errorf("%s: %+v, %v", args, c.Warnings, err)
		}
	}
}
