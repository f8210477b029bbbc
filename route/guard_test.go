package route

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/stack/loop"
	"github.com/viasocks/viasocks/stack/testkit"
)

// TestNeedsName: which names a policy needs. The first rule that is sure to match decides.
func TestNeedsName(t *testing.T) {
	file := filepath.Join(t.TempDir(), "list")
	if err := os.WriteFile(file, []byte("listed.example\n10.0.0.0/8\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	all := []string{"db.example.com", "www.example.com", "listed.example", "other.test", ""}
	for _, tt := range []struct {
		rules string // with ; between
		want  string
	}{
		{"", ""},
		{"name db.example.com port 5432 via p", "db.example.com"},
		{"name .example.com via p; name other.test via p", "db.example.com www.example.com other.test"},
		{"proto tcp port 443 via p", strings.Join(all, " ")},
		{"dst 10.0.0.0/8 via p", ""},
		{"not dst 10.0.0.0/8 via p", strings.Join(all, " ")},
		{"list=" + file + " via p", "listed.example"},
		{"not list=" + file + " via p", "db.example.com www.example.com other.test "},
		{"name db.example.com reject; port 443 via p", "www.example.com listed.example other.test "},
		{"name db.example.com port 80 reject; port 443 via p", strings.Join(all, " ")},
		{"name db.example.com user 0 drop; name db.example.com via p", "db.example.com"},
		{"reject; port 443 via p", ""},
		{"list=" + file + " reject; name listed.example via p; name other.test via p", "other.test"},
		{"not list=" + file + " reject; name other.test via p", "other.test"}, // its address may be listed
		{"not name .example.com via p", "listed.example other.test "},
		{"exe /usr/bin/curl via p", strings.Join(all, " ")},
	} {
		cfg := Config{Upstreams: []Upstream{new(manualUpstream).upstream("p")}, Guard: true}
		for s := range strings.SplitSeq(tt.rules, ";") {
			if s = strings.TrimSpace(s); s != "" {
				cfg.Rules = append(cfg.Rules, mustRule(t, s))
			}
		}
		p, err := newPolicy(cfg, nil)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, name := range all {
			if p.needsName(name) {
				got = append(got, name)
			}
		}
		if s := strings.Join(got, " "); s != tt.want {
			t.Errorf("%q needs %q, want %q", tt.rules, s, tt.want)
		}
	}
}

// wireQuestion is a message that asks for the address of a name; opcode 0 is QUERY.
func wireQuestion(name string, opcode byte) string {
	b := []byte{0, 77, 1 | opcode<<3, 0, 0, 1, 0, 0, 0, 0, 0, 0}
	for l := range strings.SplitSeq(name, ".") {
		b = append(append(b, byte(len(l))), l...)
	}
	return string(append(b, 0, 0, 1, 0, 1))
}

// TestGuardQuestions: a name that no rule needs is answered REFUSED without asking anybody, and so is an UPDATE, by UDP
// and by TCP. What is decided is written down with the name.
func TestGuardQuestions(t *testing.T) {
	testkit.CheckLeaks(t)
	var dials atomic.Int32
	up := &fakeUpstream{name: "p", dial: func(_ context.Context, _ Dest, done func(int, error)) {
		dials.Add(1)
		done(-1, unix.ECONNREFUSED)
	}}
	var file lockedBuffer
	g := newRig(t, Config{
		Upstreams: []Upstream{up}, ResolverDefault: "p", Guard: true, Decisions: &file,
		Rules:     []Rule{mustRule(t, "proto tcp name db.example.com port 443 via p")},
		Resolvers: []dns.Resolver{dns.OverTCP(netip.MustParseAddrPort("192.0.2.53:53"))},
	}, nil)
	refused := func(q string) string {
		b := []byte(q)
		b[2] |= 0x80
		b[3] = 5
		return string(b)
	}
	for _, q := range []string{
		wireQuestion("secret.attacker.test", 0), wireQuestion("db.example.com.attacker.test", 0),
		wireQuestion("db.example.com", 5),
		strings.Replace(wireQuestion("db-example.com", 0), "db-example", "db.example", 1), // one label
	} {
		g.send("10.0.0.1:5000", "203.0.113.53:53", q)
		g.wantPacket(t, "203.0.113.53:53", "10.0.0.1:5000", refused(q))
	}
	if n := dials.Load(); n != 0 {
		t.Errorf("%d connections were made for questions that are refused", n)
	}
	g.send("10.0.0.1:5000", "203.0.113.53:53", wireQuestion("DB.example.COM", 0))
	testkit.Eventually(t, "the dial to the resolver", func() bool { return dials.Load() == 1 })
	if got := g.askByTCP(t, wireQuestion("secret.attacker.test", 0)); got != refused(wireQuestion("secret.attacker.test", 0)) {
		t.Errorf("a question over TCP is answered %x", got)
	}
	if got := g.askByTCP(t, wireQuestion("db.example.com", 5)); got != refused(wireQuestion("db.example.com", 5)) {
		t.Errorf("an UPDATE over TCP is answered %x", got)
	}
	if s := g.Stats().DNS; s.Refused != 6 || s.Questions != 7 {
		t.Errorf("%+v", s)
	}
	want := []string{
		"udp reject none secret.attacker.test", "udp reject none db.example.com.attacker.test", "udp reject none db.example.com",
		"udp reject none db!example.com", "udp resolve dns db.example.com", "tcp reject none secret.attacker.test",
		"tcp reject none db.example.com",
	}
	testkit.Eventually(t, "the lines", func() bool { return len(file.lines(t)) >= len(want) })
	var got []string
	for _, d := range file.lines(t) {
		got = append(got, strings.Join([]string{d.Proto, d.Verdict, d.Rule, strings.Join(d.Names, " ")}, " "))
		if d.Dst != "203.0.113.53:53" {
			t.Errorf("%+v", d)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// askByTCP is the answer to a question that comes by a TCP connection to port 53.
func (g *rig) askByTCP(t *testing.T, q string) string {
	t.Helper()
	to := Dest{Addr: netip.MustParseAddrPort("203.0.113.53:53"), Src: netip.MustParseAddr("10.0.0.1"), SrcPort: 5001}
	got := make(chan int, 1)
	answers{&g.Router.port53}.DialStream(t.Context(), nil, to, func(s loop.Socket, err error) {
		if err != nil {
			t.Error(err)
		}
		got <- s.Release()
	})
	f := os.NewFile(uintptr(<-got), "app")
	defer f.Close()
	_ = f.SetDeadline(time.Now().Add(testkit.Patience))
	if _, err := f.Write(append([]byte{0, byte(len(q))}, q...)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 512)
	n, err := f.Read(b)
	if err != nil || n < 2 {
		t.Fatal(n, err)
	}
	return string(b[2:n])
}
