package dns

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// answerTo is an answer with a CNAME, an A and an AAAA record.
func answerTo(t testing.TB, name string, change func(*dnsmessage.Message)) []byte {
	t.Helper()
	n, alias := dnsmessage.MustNewName(name), dnsmessage.MustNewName("cdn.example.net.")
	head := func(n dnsmessage.Name, typ dnsmessage.Type, ttl uint32) dnsmessage.ResourceHeader {
		return dnsmessage.ResourceHeader{Name: n, Type: typ, Class: dnsmessage.ClassINET, TTL: ttl}
	}
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{Response: true},
		Questions: []dnsmessage.Question{{Name: n, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
		Answers: []dnsmessage.Resource{
			{Header: head(n, dnsmessage.TypeCNAME, 5), Body: &dnsmessage.CNAMEResource{CNAME: alias}},
			{Header: head(alias, dnsmessage.TypeA, 60), Body: &dnsmessage.AResource{A: [4]byte{192, 0, 2, 7}}},
			{
				Header: head(alias, dnsmessage.TypeAAAA, 90),
				Body:   &dnsmessage.AAAAResource{AAAA: [16]byte{0x20, 1, 0xd, 0xb8, 15: 7}},
			},
		},
	}
	if change != nil {
		change(&m)
	}
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func addressesIn(msg []byte) string {
	var out []string
	Addresses(msg, func(name string, a netip.Addr, ttl time.Duration) {
		out = append(out, fmt.Sprint(name, " ", a, " ", ttl))
	})
	return strings.Join(out, "; ")
}

func TestAddresses(t *testing.T) {
	const both = "www.example.com 192.0.2.7 1m0s; www.example.com 2001:db8::7 1m30s"
	whole := answerTo(t, "WWW.Example.com.", nil)
	for what, tt := range map[string]struct {
		msg  []byte
		want string
	}{
		"an answer":    {whole, both},
		"cut short":    {whole[:len(whole)-1], "www.example.com 192.0.2.7 1m0s"},
		"a question":   {answerTo(t, "a.", func(m *dnsmessage.Message) { m.Response = false }), ""},
		"no such name": {answerTo(t, "a.", func(m *dnsmessage.Message) { m.RCode = dnsmessage.RCodeNameError }), ""},
		"of the root":  {answerTo(t, ".", nil), ""},
		"another class": {answerTo(t, "a.", func(m *dnsmessage.Message) { m.Questions[0].Class = dnsmessage.ClassCHAOS }),
			""},
		"no question": {answerTo(t, "a.", func(m *dnsmessage.Message) { m.Questions = nil }), ""},
		"a negative time": {answerTo(t, "a.", func(m *dnsmessage.Message) {
			m.Answers = m.Answers[1:2]
			m.Answers[0].Header.TTL = 1 << 31
		}), "a 192.0.2.7 0s"},
		"nothing": {nil, ""},
		"garbage": {[]byte(strings.Repeat("\xc0\x0c", 40)), ""},
		"a record of chaos": {answerTo(t, "a.", func(m *dnsmessage.Message) {
			m.Answers[1].Header.Class = dnsmessage.ClassCHAOS
		}), "a 2001:db8::7 1m30s"},
	} {
		if got := addressesIn(tt.msg); got != tt.want {
			t.Errorf("%s: got %q, want %q", what, got, tt.want)
		}
	}
}

func FuzzAddresses(f *testing.F) {
	f.Add(answerTo(f, "a.example.", nil))
	f.Add([]byte("\x00\x01\x81\x80\x00\x01\x00\x01\x00\x00\x00\x00\xc0\x0c\x00\x01\x00\x01"))
	f.Fuzz(func(t *testing.T, msg []byte) {
		n := 0
		Addresses(msg, func(name string, a netip.Addr, ttl time.Duration) {
			if n++; name == "" || len(name) > 255*4 || !a.IsValid() || ttl < 0 || n > maxAddresses {
				t.Fatalf("%q %v %v", name, a, ttl)
			}
		})
	})
}
