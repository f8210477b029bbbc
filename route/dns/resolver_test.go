package dns

import (
	"strings"
	"testing"
)

func TestParseResolver(t *testing.T) {
	for s, want := range map[string]string{
		"tcp://1.1.1.1":                            "tcp://1.1.1.1:53",
		"tcp://[2001:db8::1]":                      "tcp://[2001:db8::1]:53",
		"tcp://2001:db8::1":                        "tcp://[2001:db8::1]:53",
		"tcp://[2001:db8::1]:5353":                 "tcp://[2001:db8::1]:5353",
		"tcp://::ffff:192.0.2.1":                   "tcp://192.0.2.1:53",
		"tcp://DNS.example.":                       "tcp://dns.example:53",
		"tls://1.1.1.1":                            "tls://1.1.1.1:853",
		"tls://192.0.2.1:8853#DNS.example":         "tls://192.0.2.1:8853#dns.example",
		"tls://dns.example:8853":                   "tls://dns.example:8853",
		"https://192.0.2.1/dns-query":              "https://192.0.2.1:443/dns-query",
		"https://dns.example/dns-query?x=1":        "https://dns.example:443/dns-query?x=1",
		"https://[2001:db8::1]:8443/q#dns.example": "https://[2001:db8::1]:8443/q#dns.example",
		"https://dns.example:8443/":                "https://dns.example:8443/",
		"tor":                                      "tor",
		"tor://":                                   "! is not a resolver",
		"tor://a":                                  "! is not a resolver",
		"":                                         "! is not a resolver",
		"1.1.1.1":                                  "! is not a resolver",
		"udp://1.1.1.1":                            "! is not a resolver",
		"TCP://1.1.1.1":                            "! is not a resolver",
		"tcp://":                                   "! has no usable address",
		"tcp://:53":                                "! has no usable address",
		"tcp://1.2.3":                              "! has no usable address",
		"tcp://0.0.0.0":                            "! has no usable address",
		"tcp://224.0.0.1":                          "! has no usable address",
		"tcp://[fe80::1%25eth0]":                   "! has no usable address",
		"tcp://fe80::1%eth0":                       "! has no usable address",
		"tcp://a b":                                "! has no usable address",
		"tcp://user@host":                          "! has no usable address",
		"tcp://1.1.1.1:0":                          "! needs a port",
		"tcp://a:0":                                "! needs a port",
		"tcp://a:65536":                            "! needs a port",
		"tcp://a:+53":                              "! needs a port",
		"tcp://a:domain":                           "! needs a port",
		"tcp://1.1.1.1/x":                          "! has a path",
		"tls://1.1.1.1/":                           "! has a path",
		"tcp://1.1.1.1#a":                          "! has the name of a certificate",
		"tls://dns.example#other":                  "! has two names",
		"tls://1.1.1.1#":                           "! has no usable address",
		"tls://1.1.1.1#1.1.1.1":                    "! has no usable address",
		"https://1.1.1.1":                          "! has no path",
		"https://1.1.1.1/%zz":                      "! has a path that",
		"https://1.1.1.1/a b":                      "! has a path that",
		"https://1.1.1.1/\r\nHost: x":              "! has a path that",
		"https://" + strings.Repeat("a", 300) + "/x": "! has no usable address",
	} {
		r, err := ParseResolver(s)
		if reason, bad := strings.CutPrefix(want, "! "); bad {
			if err == nil || !strings.HasPrefix(err.Error(), reason) {
				t.Errorf("%q: %+v, %v, want %q", s, r, err, reason)
			}
			continue
		}
		if err != nil || r.String() != want || r.check() != nil {
			t.Errorf("%q: %q, %v, %v, want %q", s, r, err, r.check(), want)
		}
	}
}

// What is accepted can be asked, and is written in a form that means the same.
func FuzzParseResolver(f *testing.F) {
	for _, s := range []string{"tcp://1.1.1.1", "tls://[::1]:853#a.b", "https://a.b/q?x#y", "https://1.1.1.1:1/#c", "tcp://a:1",
		"tor"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseResolver(s)
		if err != nil {
			if r != (Resolver{}) {
				t.Errorf("%q: an error and %+v", s, r)
			}
			return
		}
		again, err := ParseResolver(r.String())
		if err != nil || again != r || r.check() != nil {
			t.Errorf("%q: %+v, written as %q: %+v, %v, %v", s, r, r, again, err, r.check())
		}
	})
}
