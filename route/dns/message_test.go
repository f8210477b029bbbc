package dns

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
)

func makeQuestion(t testing.TB, name string, edns int, change func(*dnsmessage.Message)) []byte {
	t.Helper()
	m := dnsmessage.Message{
		Header: dnsmessage.Header{ID: 0x1234, RecursionDesired: true},
		Questions: []dnsmessage.Question{
			{Name: dnsmessage.MustNewName(name), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET},
		},
	}
	if edns > 0 {
		var h dnsmessage.ResourceHeader
		if err := h.SetEDNS0(edns, 0, true); err != nil {
			t.Fatal(err)
		}
		m.Additionals = append(m.Additionals, dnsmessage.Resource{Header: h, Body: &dnsmessage.OPTResource{}})
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

func TestParseQuestion(t *testing.T) {
	plain := makeQuestion(t, "example.com.", 0, nil)
	set := func(off int, v uint16) []byte {
		b := bytes.Clone(plain)
		binary.BigEndian.PutUint16(b[off:], v)
		return b
	}
	long := strings.Repeat(strings.Repeat("a", 63)+".", 3)
	for _, tt := range []struct {
		name  string
		msg   []byte
		v     disposition
		rcode uint16
		size  int
	}{
		{"plain", plain, accept, 0, 512},
		{"longest name", makeQuestion(t, long+strings.Repeat("b", 61)+".", 0, nil), accept, 0, 512},
		{"edns", makeQuestion(t, "example.com.", 1232, nil), accept, 0, 1232},
		{"edns below 512", makeQuestion(t, "example.com.", 100, nil), accept, 0, 512},
		{"edns huge", makeQuestion(t, "example.com.", 65535, nil), accept, 0, maxUDPSize},
		{"empty", nil, silence, 0, 0},
		{"short", plain[:11], silence, 0, 0},
		{"an answer", set(2, 0x8180), silence, 0, 0},
		{"notify", set(2, 4<<11), accept, 0, 512},
		{"update", makeUpdate(100), accept, 0, 512},
		{"update, cut", makeUpdate(100)[:700], answer, rcodeFormat, 0},
		{"status without a question", append([]byte{1, 2, 2 << 3}, make([]byte, 9)...), accept, 0, 512},
		{"update of two zones", func() []byte { b := makeUpdate(1); b[5] = 2; return b }(), answer, rcodeFormat, 0},
		{"DSO", set(2, 6<<11), answer, rcodeNotImp, 0},
		{"no question", set(4, 0), answer, rcodeFormat, 0},
		{"two questions", set(4, 2), answer, rcodeFormat, 0},
		{"cut name", plain[:20], answer, rcodeFormat, 0},
		{"cut type", plain[:len(plain)-3], answer, rcodeFormat, 0},
		{"pointer to itself", append(bytes.Clone(plain[:12]), 0xC0, 12, 0, 1, 0, 1), answer, rcodeFormat, 0},
		{"label type 01", append(bytes.Clone(plain[:12]), 0x41, 'a', 0, 0, 1, 0, 1), answer, rcodeFormat, 0},
		{"records that are not there", set(10, 1), answer, rcodeFormat, 0},
		{"65535 records", set(8, 65535), answer, rcodeFormat, 0},
		{"axfr", set(len(plain)-4, typeAXFR), answer, rcodeNotImp, 0},
		{"two opt", makeQuestion(t, "a.", 1232, func(m *dnsmessage.Message) {
			m.Additionals = append(m.Additionals, m.Additionals[0])
		}), answer, rcodeFormat, 0},
	} {
		q, v, rcode := parseQuestion(tt.msg)
		if v != tt.v || rcode != tt.rcode || tt.size != 0 && q.size != tt.size {
			t.Errorf("%s: disposition %d rcode %d size %d, want %d %d %d", tt.name, v, rcode, q.size, tt.v, tt.rcode, tt.size)
		}
	}
}

// makeUpdate is an UPDATE (RFC 2136) of the zone example. by some A records.
func makeUpdate(records int) []byte {
	b := []byte{0x12, 0x34, 5 << 3, 0, 0, 1, 0, 0, 0, byte(records), 0, 0}
	b = append(b, "\x07example\x00\x00\x06\x00\x01"...)
	for i := range records {
		b = append(b, 1, 'h', 0xC0, headerLen, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, byte(i))
	}
	return b
}

func TestTooLongName(t *testing.T) {
	b := makeQuestion(t, "a.", 0, nil)[:headerLen]
	for range 5 {
		b = append(append(b, 63), bytes.Repeat([]byte{'x'}, 63)...)
	}
	b = append(b, 0, 0, 1, 0, 1)
	if _, v, rcode := parseQuestion(b); v != answer || rcode != rcodeFormat {
		t.Errorf("a name of 321 bytes: disposition %d rcode %d", v, rcode)
	}
}

func makeAnswer(t testing.TB, query []byte, records int) []byte {
	t.Helper()
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil {
		t.Fatal(err)
	}
	m.Response, m.RecursionAvailable = true, true
	for range records {
		m.Answers = append(m.Answers, dnsmessage.Resource{
			Header: dnsmessage.ResourceHeader{Name: m.Questions[0].Name, Class: dnsmessage.ClassINET, TTL: 60},
			Body:   &dnsmessage.TXTResource{TXT: []string{strings.Repeat("x", 80)}},
		})
	}
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestMatches(t *testing.T) {
	query := makeQuestion(t, "Example.COM.", 0, nil)
	q, _, _ := parseQuestion(query)
	good := makeAnswer(t, query, 1)
	with := func(off int, v byte) []byte {
		b := bytes.Clone(good)
		b[off] = v
		return b
	}
	refused := bytes.Clone(good[:12])
	clear(refused[4:12])
	refused[3] = 5
	for _, tt := range []struct {
		name string
		resp []byte
		want bool
	}{
		{"good", good, true},
		{"other case", makeAnswer(t, makeQuestion(t, "eXAMPLE.com.", 0, nil), 1), true},
		{"other name", with(13, 'X'), false},
		{"other type", with(q.end-3, 28), false},
		{"type 0x41 is not 0x61", with(q.end-4, 0x20), false},
		{"other class", with(q.end-1, 3), false},
		{"a question", with(2, 1), false},
		{"two questions", with(5, 2), false},
		{"short", good[:11], false},
		{"cut", good[:q.end-1], false},
		{"error without question", refused, true},
		{"success without question", with(5, 0), false},
	} {
		if got := matches(tt.resp, query, q); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}

func FuzzQuestion(f *testing.F) {
	f.Add(makeQuestion(f, "example.com.", 0, nil))
	f.Add(makeQuestion(f, "example.com.", 4096, nil))
	f.Add([]byte("\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\xc0\x0c\x00\x01\x00\x01"))
	f.Fuzz(func(t *testing.T, msg []byte) {
		q, v, rcode := parseQuestion(msg)
		switch v {
		case answer:
			if out := errorReply(msg, q, rcode); len(out) > len(msg)+optLen || out[2]&0x80 == 0 {
				t.Fatalf("error reply of %d bytes to a message of %d", len(out), len(msg))
			}
		case accept:
			if q.end > len(msg) || q.end < headerLen+5 {
				t.Fatalf("the question ends at %d of %d", q.end, len(msg))
			}
			if _, err := new(dnsmessage.Parser).Start(msg); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func FuzzAnswer(f *testing.F) {
	query := makeQuestion(f, "example.com.", 1232, nil)
	q, _, _ := parseQuestion(query)
	f.Add(makeAnswer(f, query, 1))
	f.Add(makeAnswer(f, query, 30))
	f.Fuzz(func(t *testing.T, resp []byte) {
		if !matches(resp, query, q) {
			return
		}
		if out, _ := udpReply(bytes.Clone(resp), query, q); len(out) > q.size || binary.BigEndian.Uint16(out) != q.id {
			t.Fatalf("%x became %x", resp, out)
		} else if _, ok := walkRecords(out, func(int, uint16, []byte) bool { return true }); !ok && len(resp) > q.size {
			t.Fatalf("%x was cut to %x, which is not whole", resp, out)
		}
	})
}
