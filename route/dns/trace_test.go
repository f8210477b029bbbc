package dns

import (
	"bytes"
	"log/slog"
	"net"
	"net/netip"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/viasocks/viasocks/stack/testkit"
)

// lines is a log at debug level.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

// take gives the lines about questions so far, without their times.
func (l *lines) take() (out []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.b.String()) {
		if m := regexp.MustCompile(`msg="DNS question" (.*) us=\d+\n$`).FindStringSubmatch(line); m != nil {
			out = append(out, m[1])
		}
	}
	l.b.Reset()
	return out
}

func (l *lines) logger(level slog.Level) *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: level}))
}

func closedPort(t *testing.T) netip.AddrPort {
	l := listen(t)
	defer l.Close()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// TestQuestionLines: each question has one line, which says how it was answered.
func TestQuestionLines(t *testing.T) {
	testkit.CheckLeaks(t)
	log := &lines{}
	f, gate, _ := gatedResolver(t, 1, 300)
	at := f.addr().String()
	lab := udpServer(t, one(t, 3))
	p, _ := newTestPool(t, "198.18.0.0/15", time.Minute)
	s := start(t, Config{
		Resolvers: []Resolver{OverTCP(f.addr())}, Fake: FakeConfig{Pool: p}, Log: log.logger(slog.LevelDebug),
		Zones: []Zone{{Suffix: "lab.example", Direct: []DirectServer{{Addr: lab}}}}, DialDirect: dialDirect,
	})
	of := func(typ dnsmessage.Type) func(m *dnsmessage.Message) {
		return func(m *dnsmessage.Message) { m.Questions[0].Type = typ }
	}
	check := func(what string, want ...string) {
		t.Helper()
		if got := log.take(); strings.Join(got, "\n") != strings.Join(want, "\n") {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	ask(t, s, makeQuestion(t, "WWW.example.", 0, nil))
	check("fake", "name=www.example. type=A how=fake rcode=NOERROR")
	ask(t, s, makeQuestion(t, "localhost.", 0, of(dnsmessage.TypeAAAA)))
	check("own", "name=localhost. type=AAAA how=own rcode=NOERROR")
	ask(t, s, makeQuestion(t, "a.lab.example.", 0, nil))
	check("direct", "name=a.lab.example. type=A how=resolver server=direct:udp://"+lab.String()+" rcode=NOERROR")

	mx := makeQuestion(t, "www.example.", 0, of(dnsmessage.TypeMX))
	replies := make(chan struct{}, 2)
	for range 2 {
		s.Handle(mx, netip.AddrPort{}, func([]byte) { replies <- struct{}{} })
	}
	gate <- struct{}{}
	<-replies
	<-replies
	check("two at once", "name=www.example. type=MX how=shared rcode=NOERROR",
		"name=www.example. type=MX how=resolver server=tcp://"+at+" rcode=NOERROR")
	evil := makeQuestion(t, "e\x1b[2J \xffvil.example.", 0, of(65280))
	gate <- struct{}{}
	ask(t, s, evil)
	check("evil", "name=e![2j!!vil.example. type=TYPE65280 how=resolver server=tcp://"+at+" rcode=NOERROR")

	got := false
	refuse := func(string, bool) bool { return false }
	s.HandleJudged(makeQuestion(t, "no.example.", 0, nil), netip.AddrPort{}, refuse, func([]byte) { got = true })
	check("refused", "name=no.example. type=A how=refused rcode=REFUSED")
	bad := append([]byte(nil), mx...)
	bad[5] = 2
	s.Handle(bad, netip.AddrPort{}, func([]byte) {})
	check("malformed", "name=. type=TYPE0 how=malformed rcode=FORMERR")
	s.Handle(bad[:5], netip.AddrPort{}, func([]byte) {})
	check("garbage", "name=. type=TYPE0 how=malformed")
	if !got {
		t.Error("a refused question has no answer")
	}
}

// TestQuestionLinesOfAnswers: an answer that was kept, one that did not come, and one that is not seen.
func TestQuestionLinesOfAnswers(t *testing.T) {
	testkit.CheckLeaks(t)
	log := &lines{}
	f := newFakeResolver(t, one(t, 1))
	s := start(t, Config{Resolvers: []Resolver{OverTCP(f.addr())}, Relay: true, Log: log.logger(slog.LevelDebug)})
	q := makeQuestion(t, "a.example.", 0, nil)
	ask(t, s, q)
	ask(t, s, q)
	far := netip.MustParseAddrPort("192.0.2.53:53")
	s.HandleRelayed(q, far, nil, func() bool { return true }, func([]byte) { t.Error("an answer") },
		func() func([]byte) { t.Error("an answer is expected"); return func([]byte) {} })
	want := "name=a.example. type=A how=resolver server=tcp://" + f.addr().String() + " rcode=NOERROR\n" +
		"name=a.example. type=A how=cache rcode=NOERROR\nname=a.example. type=A how=relayed server=udp://192.0.2.53:53"
	if got := strings.Join(log.take(), "\n"); got != want {
		t.Error(got)
	}
	if st := s.Stats(); st.CacheEntries != 1 || st.CacheBytes < entryCost || st.Cached != 1 {
		t.Errorf("%+v", st)
	}
	s = start(t, Config{Resolvers: []Resolver{OverTCP(closedPort(t))}, Log: log.logger(slog.LevelDebug)})
	ask(t, s, q)
	if got := strings.Join(log.take(), "\n"); got != "name=a.example. type=A how=failed rcode=SERVFAIL" {
		t.Error(got)
	}
	cannot := newFakeResolver(t, func(q []byte) []byte {
		return respond(t, q, func(m *dnsmessage.Message) { m.RCode = dnsmessage.RCodeServerFailure })
	})
	s = start(t, Config{Resolvers: []Resolver{OverTCP(cannot.addr()), OverTCP(closedPort(t))}, Log: log.logger(slog.LevelDebug)})
	ask(t, s, q)
	if got := strings.Join(log.take(), "\n"); got != "name=a.example. type=A how=resolver server=tcp://"+cannot.addr().String()+
		" rcode=SERVFAIL" {
		t.Error(got)
	}
	s = start(t, Config{Resolvers: []Resolver{OverTCP(f.addr())}, Log: log.logger(slog.LevelInfo)})
	ask(t, s, q)
	if got := log.take(); len(got) > 0 {
		t.Error("lines without debug level: ", got)
	}
}

// BenchmarkFakeQuestion is a whole question with a fake answer, with a log at info level and at debug level.
func BenchmarkFakeQuestion(b *testing.B) {
	for _, level := range []slog.Level{slog.LevelInfo, slog.LevelDebug} {
		b.Run(level.String(), func(b *testing.B) {
			p, _ := newTestPool(b, "198.18.0.0/15", time.Minute)
			s, err := New(Config{
				Resolvers: []Resolver{OverTCP(netip.MustParseAddrPort("192.0.2.1:53"))}, Dial: dialTCP, Fake: FakeConfig{Pool: p},
				Log: slog.New(slog.NewTextHandler(nowhere{}, &slog.HandlerOptions{Level: level})),
			})
			if err != nil {
				b.Fatal(err)
			}
			msg := makeQuestion(b, "www.example.com.", 1232, nil)
			reply := func([]byte) {}
			b.ReportAllocs()
			for b.Loop() {
				s.Handle(msg, netip.AddrPort{}, reply)
			}
		})
	}
}

type nowhere struct{}

func (nowhere) Write(b []byte) (int, error) { return len(b), nil }
