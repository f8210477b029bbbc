package socks

import (
	"strings"
	"testing"
)

func TestParseServerSchemes(t *testing.T) {
	for _, tt := range []struct {
		url, want, user string
		proto           protocol
		tls             bool
	}{
		{"socks4://10.0.0.1", "socks4://10.0.0.1:1080", "", protoSOCKS4, false},
		{"SOCKS4A://al@h:9", "socks4a://h:9", "al", protoSOCKS4a, false},
		{"http://h", "http://h:80", "", protoHTTP, false},
		{"http://al:pw@[2001:db8::1]:3128/", "http://[2001:db8::1]:3128", "al", protoHTTP, false},
		{"https://al:pw@h", "https://h:443", "al", protoHTTP, true},
		{"socks5+tls://h", "socks5+tls://h:1080", "", protoSOCKS5, true},
		{"socks+tls://h", "socks5+tls://h:1080", "", protoSOCKS5, true},
		{"socks4a+tls://h", "socks4a+tls://h:1080", "", protoSOCKS4a, true},
		{"socks5+unix:///run/proxy.sock", "socks5+unix:///run/proxy.sock", "", protoSOCKS5, false},
		{"socks5+unix:///run/a%20b", "socks5+unix:///run/a b", "", protoSOCKS5, false},
		{"socks5+unix://@name", "socks5+unix://@name", "", protoSOCKS5, false},
		{"socks5h+unix://@/tmp/x", "socks5h+unix://@/tmp/x", "", protoSOCKS5, false},
		{"socks+unix://al:p%40w@/run/s", "socks5+unix:///run/s", "al", protoSOCKS5, false},
		{"socks5+unix://al@@name", "socks5+unix://@name", "al", protoSOCKS5, false},
		{"socks4a+unix:///s", "socks4a+unix:///s", "", protoSOCKS4a, false},
		{"http+unix:///s", "http+unix:///s", "", protoHTTP, false},
	} {
		s, err := ParseServer(tt.url)
		if err != nil || s.String() != tt.want || s.User() != tt.user || s.proto != tt.proto || s.TLS() != tt.tls {
			t.Errorf("%s: %v, user %q, %v, TLS %v, %v", tt.url, s, s.User(), s.proto, s.TLS(), err)
		}
	}
}

func TestParseServerRefusesSchemes(t *testing.T) {
	for _, url := range []string{
		"socks4://al:hunter2@h", "socks4a://al%00hunter2@h", "http://al%3Ahunter2:x@h", "https+tls://h", "http+tls://h",
		"https+unix:///s",
		"socks5+://h", "socks5+ssh://h", "socks6://h", "unix:///hunter2", "socks5+unix://hunter2", "socks5+unix://",
		"socks5+unix:///",
		"socks5+unix://@", "socks5+unix://al:hunter2@", "socks5+unix://al:hunter2@name", "socks5+unix://al:hunter2%zz@/s",
		"socks5+unix:///" + strings.Repeat("hunter2", 16), "socks5+unix:///a%00b", "socks5+unix:///a%zz", "ftp://hunter2",
	} {
		if s, err := ParseServer(url); err == nil {
			t.Errorf("%s is taken as %v", url, s)
		} else if strings.Contains(err.Error(), "hunter2") || !strings.HasPrefix(err.Error(), "cannot ") {
			t.Errorf("%v", err)
		}
	}
}
