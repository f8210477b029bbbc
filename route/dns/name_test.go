package dns

import (
	"bytes"
	"strings"
	"testing"
)

func TestHostNames(t *testing.T) {
	for name, want := range map[string]string{
		"Example.COM.":            "example.com",
		"_sip._tcp.example.":      "_sip._tcp.example",
		"xn--bcher-kva.example.":  "xn--bcher-kva.example",
		"localhost.":              "localhost",
		".":                       "",
		"a b.example.":            "",
		"b\xc3\xbccher.example.":  "",
		"a\x00b.example.":         "",
		"-a.example.":             "-a.example",
		"EXAMPLE-1.Example.":      "example-1.example",
		strings.Repeat("a.", 127): strings.Repeat("a.", 126) + "a",
	} {
		got, labels, ok := appendHost(nil, makeQuestion(t, name, 0, nil), headerLen)
		if ok != (want != "") || ok && (string(got) != want || labels != strings.Count(want, ".")+1) {
			t.Errorf("%q became %q (%d labels, %v), want %q", name, got, labels, ok, want)
		}
		if ok != isHost(got) && want != "" {
			t.Errorf("%q is a host: %v", got, !ok)
		}
	}
	// A dot inside a label is not the dot between two.
	msg := append(make([]byte, headerLen), "\x05a.b.c\x00"...)
	if got, _, ok := appendHost(nil, msg, headerLen); ok {
		t.Errorf("a label with dots became %q", got)
	}
	for _, bad := range []string{"", ".", "a.", ".a", "a..b", "A", "a b", "a\n", strings.Repeat("a", 64),
		strings.Repeat("a.", 127) + "a"} {
		if isHost([]byte(bad)) {
			t.Errorf("%q is a host", bad)
		}
	}
}

func TestNumbers(t *testing.T) {
	for name, want := range map[string]bool{
		"127.0.0.1": true, "127.1": true, "2130706433": true, "0x7f000001": true, "a.0x7f": true, "0177.0.0.1": true,
		"example.1": true, "0x": true,
		"1.example": false, "1and1.com": false, "0x7g": false, "a.x1": false, "abc": false, "10.in-addr.arpa": false,
		"f00": false,
	} {
		if got := isNumber([]byte(name)); got != want {
			t.Errorf("isNumber(%q) is %v", name, got)
		}
	}
}

func TestSuffix(t *testing.T) {
	for _, tt := range []struct {
		name, zone string
		want       bool
	}{{"a.local", "local", true}, {"local", "local", true}, {"alocal", "local", false}, {"local.a", "local", false},
		{"", "local", false}} {
		if got := hasSuffix([]byte(tt.name), tt.zone); got != tt.want {
			t.Errorf("%q in %q: %v", tt.name, tt.zone, got)
		}
	}
}

func FuzzHost(f *testing.F) {
	f.Add([]byte("\x03www\x07example\x00"))
	f.Add([]byte("\x03a.b\x00"))
	f.Fuzz(func(t *testing.T, wire []byte) {
		if _, ok := skipName(wire, 0, false); !ok {
			return
		}
		name, labels, ok := appendHost(nil, wire, 0)
		if ok != isHost(name) && ok {
			t.Fatalf("%q of %x is not a host", name, wire)
		}
		if ok && bytes.Count(name, []byte{'.'})+1 != labels {
			t.Fatalf("%q has not %d labels", name, labels)
		}
	})
}
