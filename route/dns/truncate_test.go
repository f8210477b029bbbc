package dns

import (
	"bytes"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
)

// rr is a record of a test's answer.
func rr(name string, body dnsmessage.ResourceBody) dnsmessage.Resource {
	return dnsmessage.Resource{
		Header: dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(name), Class: dnsmessage.ClassINET, TTL: 60},
		Body:   body,
	}
}

func addresses(name string, n int) (all []dnsmessage.Resource) {
	for i := range n {
		all = append(all, rr(name, &dnsmessage.AResource{A: [4]byte{192, 0, 2, byte(i)}}))
	}
	return all
}

// truncationCase is an answer, and what of it comes by UDP.
type truncationCase struct {
	name                            string
	edns                            int // what the asker takes
	answers, authority, additional  []dnsmessage.Resource
	wantAnswers, wantAuth, wantAddl int
	tc                              bool
}

func TestTruncation(t *testing.T) {
	chain := []dnsmessage.Resource{
		rr("www.example.com.", &dnsmessage.CNAMEResource{CNAME: dnsmessage.MustNewName("www.example.com.cdn.example.net.")}),
		rr(
			"www.example.com.cdn.example.net.",
			&dnsmessage.CNAMEResource{CNAME: dnsmessage.MustNewName("e1234.a.cdn.example.org.")},
		),
	}
	soa := rr(
		"example.com.",
		&dnsmessage.SOAResource{NS: dnsmessage.MustNewName("ns.example.com."), MBox: dnsmessage.MustNewName("root.example.com.")},
	)
	text := rr(
		"www.example.com.",
		&dnsmessage.TXTResource{TXT: []string{string(bytes.Repeat([]byte{'x'}, 250)), string(bytes.Repeat([]byte{'y'}, 200))}},
	)
	for _, tt := range []truncationCase{
		// The header and the question have 33 bytes, an A record 16.
		{"31 addresses", 0, addresses("www.example.com.", 31), nil, nil, 29, 0, 0, true},
		{"29 addresses fit", 0, addresses("www.example.com.", 29), nil, nil, 29, 0, 0, false},
		{"a chain and 30 addresses", 0, append(chain[:2:2], addresses("e1234.a.cdn.example.org.", 30)...), nil, nil, 2 + 24, 0, 0,
			true},
		{"EDNS, and it fits", 4096, addresses("www.example.com.", 200), nil, []dnsmessage.Resource{badVersOPT(t, 8)}, 200, 0, 1,
			false},
		{"EDNS, and the options stay", 600, addresses("www.example.com.", 200), nil, []dnsmessage.Resource{badVersOPT(t, 8)}, 34,
			0, 1, true},
		{"options that fill it go", 600, addresses("www.example.com.", 200), nil, []dnsmessage.Resource{badVersOPT(t, 500)}, 34,
			0, 1, true},
		{"authority is missing", 0, addresses("www.example.com.", 28), []dnsmessage.Resource{soa, soa}, nil, 28, 0, 0, true},
		{"only additional is missing", 0, addresses("www.example.com.", 20), nil, addresses("ns.example.com.", 20), 20, 0, 9,
			false},
		{"glue before OPT", 600, addresses("www.example.com.", 28), nil, append(addresses("ns.example.com.", 20),
			badVersOPT(t, 8)), 28, 0, 5 + 1, false},
		{"a record that is too long", 0, []dnsmessage.Resource{text, text}, nil, nil, 1, 0, 0, true},
	} {
		t.Run(tt.name, tt.check)
	}
}

// badVersOPT is an OPT record with n bytes of options, in which the upper bits of the RCODE BADVERS stand.
func badVersOPT(t *testing.T, n int) dnsmessage.Resource {
	t.Helper()
	var h dnsmessage.ResourceHeader
	if err := h.SetEDNS0(1232, 16, true); err != nil {
		t.Fatal(err)
	}
	return dnsmessage.Resource{
		Header: h,
		Body:   &dnsmessage.OPTResource{Options: []dnsmessage.Option{{Code: 10, Data: make([]byte, n)}}},
	}
}

func (tt truncationCase) check(t *testing.T) {
	query := makeQuestion(t, "www.example.com.", tt.edns, nil)
	q, _, _ := parseQuestion(query)
	m := dnsmessage.Message{
		Header:      dnsmessage.Header{ID: 7, Response: true},
		Answers:     tt.answers,
		Authorities: tt.authority,
		Additionals: tt.additional,
		Questions: []dnsmessage.Question{
			{Name: dnsmessage.MustNewName("www.example.com."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET},
		},
	}
	resp, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	out, truncated := udpReply(resp, query, q)
	if len(out) > q.size {
		t.Errorf("%d bytes to one who takes %d", len(out), q.size)
	}
	var got dnsmessage.Message
	if err := got.Unpack(out); err != nil {
		t.Fatal(err)
	}
	if len(got.Answers) != tt.wantAnswers || len(got.Authorities) != tt.wantAuth || len(got.Additionals) != tt.wantAddl ||
		got.Truncated != tt.tc ||
		truncated != tt.tc {
		t.Errorf(
			"%d, %d and %d records, TC %v; want %d, %d, %d, %v",
			len(got.Answers),
			len(got.Authorities),
			len(got.Additionals),
			got.Truncated,
			tt.wantAnswers,
			tt.wantAuth,
			tt.wantAddl,
			tt.tc,
		)
	}
	for i, r := range got.Answers {
		if r.GoString() != m.Answers[i].GoString() && r.Body.GoString() != m.Answers[i].Body.GoString() {
			t.Errorf("record %d became %v", i, r)
		}
	}
	if n := len(got.Additionals); n > 0 && tt.edns > 0 && got.Additionals[n-1].Header.Type == dnsmessage.TypeOPT &&
		got.Additionals[n-1].Header.ExtendedRCode(0) != 16 {
		t.Errorf("the upper bits of the RCODE are lost: %v", got.Additionals[n-1].Header)
	}
}

// TestTruncationOfGarbage: what cannot be read becomes a question with TC.
func TestTruncationOfGarbage(t *testing.T) {
	query := makeQuestion(t, "www.example.com.", 0, nil)
	q, _, _ := parseQuestion(query)
	resp := makeAnswer(t, query, 20)
	resp[7] = 200 // records that are not there
	out, truncated := udpReply(resp, query, q)
	if !truncated || len(out) != q.end || out[2]&2 == 0 || !bytes.Equal(out[6:headerLen], make([]byte, 6)) {
		t.Errorf("%x", out)
	}
}
