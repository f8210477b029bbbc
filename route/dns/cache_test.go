package dns

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

var cacheEpoch = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

// keyOf is the key of a question; ok: it may be shared.
func keyOf(t testing.TB, msg []byte) (key string, q question, ok bool) {
	t.Helper()
	q, v, _ := parseQuestion(msg)
	if v != accept {
		t.Fatalf("the question is bad: %x", msg)
	}
	b, ok := appendKey(nil, msg, &q, Resolver{})
	return string(b), q, ok
}

// respond is an answer to a question, changed by change.
func respond(t testing.TB, query []byte, change func(*dnsmessage.Message)) []byte {
	t.Helper()
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil {
		t.Fatal(err)
	}
	m.Response, m.RecursionAvailable = true, true
	change(&m)
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func record(name string, ttl uint32, body dnsmessage.ResourceBody) dnsmessage.Resource {
	h := dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(name), Class: dnsmessage.ClassINET, TTL: ttl}
	return dnsmessage.Resource{Header: h, Body: body}
}

func soa(ttl, minimum uint32) dnsmessage.Resource {
	return record("example.com.", ttl, &dnsmessage.SOAResource{
		NS: dnsmessage.MustNewName("ns.example.com."), MBox: dnsmessage.MustNewName("x.example.com."), MinTTL: minimum,
	})
}

func addr4(n byte) dnsmessage.ResourceBody { return &dnsmessage.AResource{A: [4]byte{192, 0, 2, n}} }

// opt is an OPT record of the root with options.
func opt(options ...dnsmessage.Option) dnsmessage.Resource {
	var h dnsmessage.ResourceHeader
	_ = h.SetEDNS0(1232, 0, false)
	return dnsmessage.Resource{Header: h, Body: &dnsmessage.OPTResource{Options: options}}
}

// TestCacheLife: for how long answers are kept, by RFC 2308, 2181 8 and 7871.
func TestCacheLife(t *testing.T) {
	name := "www.example.com."
	for _, tt := range []struct {
		what   string
		change func(*dnsmessage.Message)
		life   time.Duration // 0: it is not kept
	}{
		{"one record", func(m *dnsmessage.Message) {
			m.Answers = append(m.Answers, record(name, 300, addr4(1)))
		}, 300 * time.Second},
		{"the smallest TTL of all sections", func(m *dnsmessage.Message) {
			m.Answers = append(m.Answers, record(name, 300, addr4(1)), record(name, 200, addr4(2)))
			m.Additionals = append(m.Additionals, record("x.example.com.", 100, addr4(3)))
		}, 100 * time.Second},
		{"a TTL of 0", func(m *dnsmessage.Message) { m.Answers = append(m.Answers, record(name, 0, addr4(1))) }, 0},
		{"a negative TTL", func(m *dnsmessage.Message) { m.Answers = append(m.Answers, record(name, 1<<31, addr4(1))) }, 0},
		{"a long TTL", func(m *dnsmessage.Message) { m.Answers = append(m.Answers, record(name, 86400*7, addr4(1))) }, maxLife},
		{"no such name", func(m *dnsmessage.Message) {
			m.RCode, m.Authorities = dnsmessage.RCodeNameError, append(m.Authorities, soa(3600, 60))
		}, time.Minute},
		{"no such name, a short SOA", func(m *dnsmessage.Message) {
			m.RCode, m.Authorities = dnsmessage.RCodeNameError, append(m.Authorities, soa(30, 60))
		}, 30 * time.Second},
		{"no such name, no SOA", func(m *dnsmessage.Message) { m.RCode = dnsmessage.RCodeNameError }, 0},
		{"no such record", func(m *dnsmessage.Message) { m.Authorities = append(m.Authorities, soa(3600, 60)) }, time.Minute},
		{"no such record behind an alias, no SOA", func(m *dnsmessage.Message) {
			m.Answers = append(m.Answers,
				record(name, 300, &dnsmessage.CNAMEResource{CNAME: dnsmessage.MustNewName("x.example.com.")}))
		}, 0},
		{"nothing at all", func(m *dnsmessage.Message) {}, 0},
		{"SERVFAIL", func(m *dnsmessage.Message) { m.RCode = dnsmessage.RCodeServerFailure }, failureLife},
		{"REFUSED", func(m *dnsmessage.Message) { m.RCode = dnsmessage.RCodeRefused }, 0},
		{"truncated", func(m *dnsmessage.Message) {
			m.Truncated, m.Answers = true, append(m.Answers, record(name, 300, addr4(1)))
		}, 0},
		{"for this network (ECS)", func(m *dnsmessage.Message) {
			m.Answers = append(m.Answers, record(name, 300, addr4(1)))
			m.Additionals = append(m.Additionals, opt(dnsmessage.Option{Code: optionECS, Data: []byte{0, 1, 24, 24, 192, 0, 2}}))
		}, 0},
		{"for all networks (ECS)", func(m *dnsmessage.Message) {
			m.Answers = append(m.Answers, record(name, 300, addr4(1)))
			m.Additionals = append(m.Additionals, opt(dnsmessage.Option{Code: optionECS, Data: []byte{0, 1, 24, 0, 192, 0, 2}}))
		}, 300 * time.Second},
		{"two OPT records", func(m *dnsmessage.Message) {
			m.Answers = append(m.Answers, record(name, 300, addr4(1)))
			m.Additionals = append(m.Additionals, opt(), opt())
		}, 0},
		{"signed", func(m *dnsmessage.Message) {
			m.Answers = append(m.Answers, record(name, 300, addr4(1)))
			r := record(name, 0, &dnsmessage.UnknownResource{Type: typeTSIG, Data: []byte{1}})
			r.Header.Type = typeTSIG
			m.Additionals = append(m.Additionals, r)
		}, 0},
	} {
		t.Run(tt.what, func(t *testing.T) {
			query := makeQuestion(t, name, 0, nil)
			key, q, _ := keyOf(t, query)
			c := newCache(10, 1<<20)
			c.put(key, plainAnswer(respond(t, query, tt.change), q.qtype), q.qtype, cacheEpoch)
			_, _, ok := c.get(nil, []byte(key), query, &q, cacheEpoch.Add(tt.life-1))
			if ok != (tt.life > 0) {
				t.Errorf("kept before %v: %v", tt.life, ok)
			}
			if _, _, ok = c.get(nil, []byte(key), query, &q, cacheEpoch.Add(tt.life)); ok {
				t.Errorf("kept after %v", tt.life)
			}
		})
	}
}

// TestCacheKeys: which questions share an answer.
func TestCacheKeys(t *testing.T) {
	plain := makeQuestion(t, "www.example.com.", 0, nil)
	base, _, _ := keyOf(t, plain)
	with := func(options ...dnsmessage.Option) func(*dnsmessage.Message) {
		return func(m *dnsmessage.Message) { m.Additionals = append(m.Additionals, opt(options...)) }
	}
	for _, tt := range []struct {
		what      string
		name      string
		edns      int
		change    func(*dnsmessage.Message)
		ok, equal bool
	}{
		{"the same", "www.example.com.", 0, nil, true, true},
		{"another case", "WWW.Example.com.", 0, nil, true, true},
		{"another name", "ww.example.com.", 0, nil, true, false},
		{"EDNS", "www.example.com.", 0, with(), true, true},
		{"EDNS with DO", "www.example.com.", 1232, nil, true, false},
		{"a cookie", "www.example.com.", 0, with(dnsmessage.Option{Code: optionCookie, Data: make([]byte, 8)}), true, true},
		{"ECS", "www.example.com.", 0, with(dnsmessage.Option{Code: optionECS, Data: []byte{0, 1, 0, 0}}), false, false},
		{"NSID", "www.example.com.", 0, with(dnsmessage.Option{Code: 3}), false, false},
		{"another type", "www.example.com.", 0, func(m *dnsmessage.Message) { m.Questions[0].Type = 15 }, true, false},
		{"another class", "www.example.com.", 0, func(m *dnsmessage.Message) { m.Questions[0].Class = 3 }, true, false},
		{"not recursive", "www.example.com.", 0, func(m *dnsmessage.Message) { m.RecursionDesired = false }, true, false},
		{"checking disabled", "www.example.com.", 0, func(m *dnsmessage.Message) { m.CheckingDisabled = true }, true, false},
		{"authentic data", "www.example.com.", 0, func(m *dnsmessage.Message) { m.AuthenticData = true }, true, false},
		{"a key exchange", "www.example.com.", 0, func(m *dnsmessage.Message) { m.Questions[0].Type = typeTKEY }, false, false},
		{"a notification", "www.example.com.", 0, func(m *dnsmessage.Message) { m.OpCode = 4 }, false, false},
		{"a record in the question", "www.example.com.", 0, func(m *dnsmessage.Message) {
			m.Additionals = append(m.Additionals, record("x.", 1, addr4(1)))
		}, false, false},
	} {
		key, _, ok := keyOf(t, makeQuestion(t, tt.name, tt.edns, tt.change))
		if ok != tt.ok || ok && (key == base) != tt.equal {
			t.Errorf("%s: shared %v, the same answer %v", tt.what, ok, key == base)
		}
	}
	q, _, _ := parseQuestion(plain)
	at, _ := appendKey(nil, plain, &q, OverTCP(netip.MustParseAddrPort("192.0.2.1:53")))
	if string(at) == base || len(at) > keyLen {
		t.Errorf("a question for one server has the key %x", at)
	}
}

// cacheAnswersCases are the cases of TestCacheAnswers.
var cacheAnswersCases = []struct {
	what     string
	edns     int
	answers  int
	trunc    bool
	sections [2]int // additional records that are no OPT, and OPT
}{
	{"plain", 0, 29, true, [2]int{0, 0}},
	{"EDNS", 1232, 40, false, [2]int{1, 1}},
}

// TestCacheAnswers: every asker gets the answer in its own form.
func TestCacheAnswers(t *testing.T) {
	query := makeQuestion(t, "www.example.com.", 0, nil)
	key, q, _ := keyOf(t, query)
	resp := respond(t, query, func(m *dnsmessage.Message) {
		m.Authoritative = true
		for i := range 40 {
			m.Answers = append(m.Answers, record("www.example.com.", 100+uint32(i), addr4(byte(i))))
		}
		m.Additionals = append(
			m.Additionals,
			record("x.example.com.", 400, addr4(9)),
			opt(),
			record("y.example.com.", 50, addr4(9)),
		)
	})
	c := newCache(10, 1<<20)
	c.put(key, plainAnswer(resp, q.qtype), q.qtype, cacheEpoch)
	for _, tt := range cacheAnswersCases {
		asker := makeQuestion(t, "wWw.eXample.com.", tt.edns, func(m *dnsmessage.Message) {
			m.ID = 0xBEEF
			for i := range m.Additionals {
				m.Additionals[i].Header.TTL = 0 // without DO, which is another question
			}
		})
		_, aq, _ := keyOf(t, asker)
		b, trunc, ok := c.get(nil, []byte(key), asker, &aq, cacheEpoch.Add(30*time.Second+time.Millisecond))
		var m dnsmessage.Message
		if err := m.Unpack(b); err != nil || !ok {
			t.Fatal(tt.what, ok, err)
		}
		opts := 0
		for _, r := range m.Additionals {
			if r.Header.Type == dnsmessage.TypeOPT {
				opts++
			} else if r.Header.TTL != 370 {
				t.Errorf("%s: the TTL of a name server is %d", tt.what, r.Header.TTL)
			}
		}
		if m.ID != 0xBEEF || m.Questions[0].Name.String() != "wWw.eXample.com." ||
			m.Answers[0].Header.Name.String() != "wWw.eXample.com." {
			t.Errorf("%s: %v", tt.what, m.GoString())
		}
		if trunc != tt.trunc || m.Truncated != trunc || len(m.Answers) != tt.answers || m.Authoritative || len(b) > aq.size ||
			[2]int{len(m.Additionals) - opts, opts} != tt.sections || m.Answers[5].Header.TTL != 75 {
			t.Errorf(
				"%s: %d answers, truncated %v, %d additional, %d bytes",
				tt.what,
				len(m.Answers),
				m.Truncated,
				len(m.Additionals),
				len(b),
			)
		}
	}
}

// TestCacheNegativeTTL: the asker may not keep a negative answer for longer than the SOA record says.
func TestCacheNegativeTTL(t *testing.T) {
	query := makeQuestion(t, "no.example.com.", 0, nil)
	key, q, _ := keyOf(t, query)
	c := newCache(10, 1<<20)
	resp := respond(t, query, func(m *dnsmessage.Message) {
		m.RCode, m.Authorities = dnsmessage.RCodeNameError, append(m.Authorities, soa(3600, 60))
	})
	c.put(key, plainAnswer(resp, q.qtype), q.qtype, cacheEpoch)
	b, _, _ := c.get(nil, []byte(key), query, &q, cacheEpoch.Add(20*time.Second))
	var m dnsmessage.Message
	if err := m.Unpack(b); err != nil || m.RCode != dnsmessage.RCodeNameError || m.Authorities[0].Header.TTL != 40 {
		t.Error(m.GoString(), err)
	}
}

// TestCacheModel runs random operations on a cache and on a simple model of it: what the cache gives is what was put last, with
// the right TTL, it is there unless it ended or was the one that was used least recently, and the bounds hold.
func TestCacheModel(t *testing.T) {
	const entries, most = 20, 12_000
	rnd := rand.New(rand.NewPCG(1, 2))
	m := cacheModel{t: t, c: newCache(entries, most), kept: map[string]*modelEntry{}, now: cacheEpoch}
	for m.step = range 200_000 {
		m.now = m.now.Add(time.Duration(rnd.Int64N(int64(time.Second))))
		query := makeQuestionFast(fmt.Sprintf("n%d.example.", rnd.IntN(40)))
		switch op := rnd.IntN(20); {
		case op == 0 && rnd.IntN(100) == 0:
			m.c.clear()
			clear(m.kept)
		case op < 8:
			m.put(query, byte(rnd.IntN(256)), uint32(rnd.IntN(40)), rnd.IntN(60))
		default:
			m.get(query)
		}
		m.bound(entries, most)
	}
	if m.hits < 10_000 || m.gone < 1000 {
		t.Errorf("only %d hits, %d ended", m.hits, m.gone)
	}
}

// cacheModel is a cache and a simple model of it.
type cacheModel struct {
	t          *testing.T
	c          *cache
	kept       map[string]*modelEntry
	step       int
	now        time.Time
	hits, gone int
}

type modelEntry struct {
	n           byte
	ttl         uint32
	at          time.Time
	more        int
	size, order int
}

func (m *cacheModel) put(query []byte, n byte, ttl uint32, pad int) {
	key, q, _ := keyOf(m.t, query)
	resp := answerFast(query, n, ttl, pad)
	m.c.put(key, plainAnswer(resp, q.qtype), q.qtype, m.now)
	if ttl != 0 {
		m.kept[key] = &modelEntry{n, ttl, m.now, pad, entryCost + len(key) + len(resp), m.step}
	}
}

func (m *cacheModel) get(query []byte) {
	m.t.Helper()
	key, q, _ := keyOf(m.t, query)
	q.size = maxMessage
	b, _, ok := m.c.get(nil, []byte(key), query, &q, m.now)
	k := m.kept[key]
	alive := k != nil && m.now.Before(k.at.Add(time.Duration(k.ttl)*time.Second))
	if ok != alive {
		m.t.Fatalf("step %d: the answer to %q is there: %v, want %v", m.step, query, ok, alive)
	}
	if k != nil && !alive {
		delete(m.kept, key)
		m.gone++
	}
	if !ok {
		return
	}
	m.hits++
	k.order = m.step
	want := answerFast(query, k.n, k.ttl-uint32(m.now.Sub(k.at)/time.Second), k.more)
	if !bytes.Equal(b, want) {
		m.t.Fatalf("step %d: %x, want %x", m.step, b, want)
	}
}

// bound removes from the model what was used least recently until it keeps to the bounds, as the cache must have done.
func (m *cacheModel) bound(entries, most int) {
	m.t.Helper()
	for {
		size, oldest := 0, ""
		for key, k := range m.kept {
			size += k.size
			if oldest == "" || k.order < m.kept[oldest].order {
				oldest = key
			}
		}
		if n := len(m.kept); n <= entries && size <= most {
			if e, b := m.c.usage(); e != n || b != size {
				m.t.Fatalf("step %d: %d entries of %d bytes, want %d of %d", m.step, e, b, n, size)
			}
			return
		}
		delete(m.kept, oldest)
	}
}

// makeQuestionFast is a question for an A record.
func makeQuestionFast(name string) []byte {
	msg := []byte{0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}
	return append(appendWire(msg, []byte(strings.TrimSuffix(name, "."))), 0, typeA, 0, classIN)
}

// answerFast has one A record, and more of a pad.
func answerFast(query []byte, n byte, ttl uint32, more int) []byte {
	b := append([]byte(nil), query...)
	b[2], b[3], b[7] = 0x81, 0x80, byte(1+more)
	for i := range 1 + more {
		b = append(appendRecord(b, typeA, ttl, 4), 192, 0, byte(i), n)
	}
	return b
}

// TestCacheAllocations: an answer that is kept costs its asker no memory.
func TestCacheAllocations(t *testing.T) {
	query := makeQuestionFast("www.example.com.")
	key, q, _ := keyOf(t, query)
	s := &Server{cache: newCache(10, 1<<20)}
	s.cache.put(key, plainAnswer(answerFast(query, 1, 3600, 3), q.qtype), q.qtype, time.Now())
	reply := func([]byte) {}
	if n := testing.AllocsPerRun(1000, func() {
		if !s.ask(nil, query, &q, Resolver{}, always(reply)) {
			t.Fatal("it is not in the cache")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzCache: whatever a resolver answers, what the cache gives can be read to its end, fits the asker, and lives no longer than
// the answer said.
func FuzzCache(f *testing.F) {
	query := makeQuestionFast("www.example.com.")
	edns := append(append([]byte(nil), query...), 0, 0, typeOPT, 4, 0xD0, 0, 0, 0, 0, 0, 0)
	edns[11] = 1
	add := func(q, resp []byte) { f.Add(q, resp[len(query):], resp[2], resp[3], uint16(5)) }
	add(query, answerFast(query, 1, 300, 3))
	add(edns, answerFast(query, 1, 300, 60))
	add(query, respond(f, query, func(m *dnsmessage.Message) {
		m.RCode, m.Authorities = dnsmessage.RCodeNameError, append(m.Authorities, soa(3600, 60))
		m.Additionals = append(m.Additionals, opt(dnsmessage.Option{Code: optionECS, Data: []byte{0, 1, 24, 0, 192, 0, 2}}))
	}))
	f.Fuzz(func(t *testing.T, query, records []byte, hi, lo byte, age uint16) {
		q, v, _ := parseQuestion(query)
		key, ok := appendKey(nil, query, &q, Resolver{})
		if v != accept || !ok || len(key) > keyLen || len(records) > 2048 {
			return
		}
		resp := append(append([]byte(nil), query[:q.end]...), records...)
		resp[2], resp[3] = hi|0x80, lo
		if len(records) > 6 {
			copy(resp[6:12], records)
			resp[6], resp[8], resp[10] = 0, 0, 0
		}
		if !matches(resp, query, q) {
			return
		}
		before := bytes.Clone(resp)
		c := newCache(4, 1<<16)
		plain := plainAnswer(resp, q.qtype)
		if !bytes.Equal(before, resp) {
			t.Fatal("the answer was changed")
		}
		c.put(string(key), plain, q.qtype, cacheEpoch)
		at := cacheEpoch.Add(time.Duration(age) * time.Second)
		b, trunc, ok := c.get(nil, key, query, &q, at)
		if !ok {
			return
		}
		if len(b) > q.size || !bytes.Equal(b[:2], query[:2]) || !bytes.Equal(b[headerLen:q.end], query[headerLen:q.end]) {
			t.Fatalf("%x is no answer to %x", b, query)
		}
		if trunc {
			return
		}
		n := 0
		if _, whole := walkRecords(b, func(_ int, typ uint16, record []byte) bool {
			if _, ttl := recordTTL(record); typ != typeOPT && int64(ttl)+int64(age) > 1<<31-1 {
				t.Fatalf("a TTL of %d", ttl)
			}
			n++
			return true
		}); !whole {
			t.Fatalf("%x cannot be read to its end", b)
		}
	})
}
