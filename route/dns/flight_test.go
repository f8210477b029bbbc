package dns

import (
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/viasocks/viasocks/stack/testkit"
)

// gatedResolver answers with n records of this TTL, each question once more may pass, and counts the questions.
func gatedResolver(t *testing.T, n int, ttl uint32) (f *fakeResolver, gate chan struct{}, asked *atomic.Int32) {
	t.Helper()
	gate, asked = make(chan struct{}, 1000), &atomic.Int32{}
	over := make(chan struct{})
	f = newFakeResolver(t, func(q []byte) []byte {
		asked.Add(1)
		select {
		case <-gate:
		case <-over:
		}
		return respond(t, q, func(m *dnsmessage.Message) {
			for i := range n {
				m.Answers = append(m.Answers, record(m.Questions[0].Name.String(), ttl, addr4(byte(i))))
			}
		})
	})
	t.Cleanup(func() { close(over) })
	return f, gate, asked
}

// TestSharedQuestions: what many ask at once is asked once, and each asker gets its own ID, case, EDNS and truncation; one over
// TCP that went away does not matter.
func TestSharedQuestions(t *testing.T) {
	testkit.CheckLeaks(t)
	f, gate, asked := gatedResolver(t, 40, 0)
	s := start(t, Config{Resolvers: []Resolver{OverTCP(f.addr())}})
	type got struct {
		who sharedAsker
		b   []byte
	}
	replies := make(chan got, 100)
	for i := range sharedAsker(50) {
		s.Handle(i.question(t), netip.AddrPort{}, func(b []byte) { replies <- got{i, append([]byte(nil), b...)} })
	}
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	s.ServeTCP(fds[1], netip.AddrPort{}, nil, nil)
	goner := os.NewFile(uintptr(fds[0]), "goner")
	q := sharedAsker(0).question(t)
	if _, err := goner.Write(append([]byte{0, byte(len(q))}, q...)); err != nil {
		t.Fatal(err)
	}
	if !testkit.Until(testkit.Patience, func() bool { return s.Stats().Questions == 51 }) {
		t.Fatal("the question over TCP did not come")
	}
	goner.Close()
	gate <- struct{}{}
	for range 50 {
		r := <-replies
		r.who.check(t, r.b)
	}
	if st := s.Stats(); asked.Load() != 1 || st.Shared != 50 || st.Answered != 51 {
		t.Errorf("the resolver was asked %d times: %+v", asked.Load(), st)
	}
	gate <- struct{}{} // a TTL of 0 is not kept: it is asked anew
	ask(t, s, sharedAsker(0).question(t))
	if asked.Load() != 2 {
		t.Error("the resolver was not asked again")
	}
}

// sharedAsker is one of many who ask the same, each in its own way.
type sharedAsker int

func (a sharedAsker) edns() int { return []int{0, 0, 600, 1232}[a%4] }

func (a sharedAsker) name() string {
	return []string{"www.example.com.", "WWW.example.com.", "www.EXAMPLE.com."}[a%3]
}

func (a sharedAsker) question(t *testing.T) []byte {
	t.Helper()
	return makeQuestion(t, a.name(), a.edns(), func(m *dnsmessage.Message) {
		m.ID = uint16(a)
		for i := range m.Additionals { // no DO
			m.Additionals[i].Header.TTL = 0
		}
	})
}

// check looks at the answer to the question, of which there are 40 records.
func (a sharedAsker) check(t *testing.T, b []byte) {
	t.Helper()
	var m dnsmessage.Message
	if err := m.Unpack(b); err != nil {
		t.Fatal(err)
	}
	size, want, opts := max(512, a.edns()), 40, 0
	if size < 700 {
		want = (size - 33 - min(a.edns(), 1)*11) / 16
	}
	if a.edns() > 0 {
		opts = 1
	}
	if m.ID != uint16(a) || m.Questions[0].Name.String() != a.name() || len(m.Answers) != want ||
		m.Truncated != (want < 40) || len(m.Additionals) != opts || len(b) > size {
		t.Errorf("asker %d: %d answers of %d, %d bytes: %v", a, len(m.Answers), want, len(b), m.Questions)
	}
}

// TestSharedFailure: when no resolver answers everybody who waits is told.
func TestSharedFailure(t *testing.T) {
	testkit.CheckLeaks(t)
	s := start(t, Config{Resolvers: []Resolver{OverTCP(netip.MustParseAddrPort("127.0.0.1:9"))}, Timeout: 500 * time.Millisecond})
	var all sync.WaitGroup
	for range 20 {
		all.Add(1)
		s.Handle(makeQuestion(t, "a.", 0, nil), netip.AddrPort{}, func(b []byte) {
			defer all.Done()
			if b[3]&15 != rcodeServer {
				t.Errorf("%x", b)
			}
		})
	}
	all.Wait()
}

// TestSharedBound: no more askers wait than InFlight.
func TestSharedBound(t *testing.T) {
	testkit.CheckLeaks(t)
	f, gate, _ := gatedResolver(t, 1, 0)
	s := start(t, Config{Resolvers: []Resolver{OverTCP(f.addr())}, InFlight: 8})
	var replies atomic.Int32
	for range 100 {
		s.Handle(makeQuestion(t, "a.", 0, nil), netip.AddrPort{}, func(b []byte) { replies.Add(1) })
	}
	gate <- struct{}{}
	if !testkit.Until(testkit.Patience, func() bool { return replies.Load() == 9 }) {
		t.Fatalf("%d replies, %+v", replies.Load(), s.Stats())
	}
	if st := s.Stats(); st.Dropped != 91 {
		t.Errorf("%+v", st)
	}
}

// TestFlightWithoutEnd: a leader that was dropped keeps nobody waiting for ever.
func TestFlightWithoutEnd(t *testing.T) {
	f := flights{most: 2}
	msg := makeQuestionFast("a.")
	q, _, _ := parseQuestion(msg)
	now := cacheEpoch
	join := func() role { return f.join([]byte("k"), msg, &q, nil, now, now.Add(time.Second)) }
	if join() != leads || join() != follows || join() != follows || join() != tooMany {
		t.Error("the roles are wrong")
	}
	if now = now.Add(time.Second); join() != leads || f.waiting != 0 || join() != follows {
		t.Error("the flight was not replaced")
	}
	if n := len(f.land("k")); n != 1 || f.waiting != 0 || f.land("k") != nil {
		t.Errorf("%d askers waited", n)
	}
}

// TestCached: an answer is given again without the resolver, also by TCP, and not after Forget.
func TestCached(t *testing.T) {
	testkit.CheckLeaks(t)
	f, gate, asked := gatedResolver(t, 40, 300)
	for range 10 {
		gate <- struct{}{}
	}
	s := start(t, Config{Resolvers: []Resolver{OverTCP(f.addr())}})
	for i := range 3 {
		var m dnsmessage.Message
		if err := m.Unpack(ask(t, s, makeQuestion(t, "a.", 0, nil))); err != nil || !m.Truncated {
			t.Fatalf("question %d: %v %v", i, m.GoString(), err)
		}
	}
	whole := make(chan int, 1)
	s.Ask(makeQuestion(t, "A.", 0, nil), func(b []byte) {
		var m dnsmessage.Message
		if err := m.Unpack(b); err != nil {
			t.Error(err)
		}
		whole <- len(m.Answers)
	})
	if n := <-whole; n != 40 {
		t.Errorf("%d answers over TCP", n)
	}
	if st := s.Stats(); asked.Load() != 1 || st.Cached != 3 || st.Answered != 1 {
		t.Errorf("the resolver was asked %d times: %+v", asked.Load(), st)
	}
	s.Forget()
	if ask(t, s, makeQuestion(t, "a.", 0, nil)); asked.Load() != 2 {
		t.Errorf("the resolver was asked %d times after Forget", asked.Load())
	}
}
