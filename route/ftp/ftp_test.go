package ftp

import (
	"bytes"
	"errors"
	"io"
	"net/netip"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/stack/flow"
)

func TestParse(t *testing.T) {
	for line, want := range map[string]string{
		"PORT 198,18,0,1,4,1\r\n":              "198.18.0.1:1025",
		"port 198,18,0,1,255,255 \n":           "198.18.0.1:65535",
		"EPRT |1|198.18.0.1|6275|\r\n":         "198.18.0.1:6275",
		"ePrT !2!fd76::1!65535!\r\n":           "[fd76::1]:65535",
		"PORT 198,18,0,1,0,0\r\n":              "",
		"PORT 198,18,0,256,4,1\r\n":            "",
		"PORT 198,18,0,1,4\r\n":                "",
		"PORT 198,18,0,1,4,1,1\r\n":            "",
		"PORT 198,18,0,+1,4,1\r\n":             "",
		"PORT\r\n":                             "",
		"PORT 198,18,0,1,4,1":                  "",
		"PORTS 198,18,0,1,4,1\r\n":             "",
		"EPRT |1|198.18.0.1|0|\r\n":            "",
		"EPRT |1|198.18.0.1|65536|\r\n":        "",
		"EPRT |2|198.18.0.1|6275|\r\n":         "",
		"EPRT |1|fd76::1|6275|\r\n":            "",
		"EPRT |2|fe80::1%lo|6275|\r\n":         "",
		"EPRT |2|::ffff:198.18.0.1|6275|\r\n":  "",
		"EPRT |1|198.18.0.1|6275\r\n":          "",
		"EPRT |3|198.18.0.1|6275|\r\n":         "",
		"EPRT \r\n":                            "",
		"USER anonymous\r\n":                   "",
		"PORT " + strings.Repeat(" ", MaxLine): "",
	} {
		c, ok := parse([]byte(line))
		if got := c.at.String(); ok != (want != "") || ok && got != want {
			t.Errorf("%q: %v, %v", line, c, ok)
		}
	}
}

func TestFormat(t *testing.T) {
	v4, v6 := netip.MustParseAddrPort("203.0.113.1:40000"), netip.MustParseAddrPort("[2001:db8::1]:40001")
	for _, row := range []struct {
		eprt bool
		at   netip.AddrPort
		want string
	}{
		{false, v4, "PORT 203,0,113,1,156,64\r\n"},
		{true, v4, "EPRT |1|203.0.113.1|40000|\r\n"},
		{false, v6, "EPRT |2|2001:db8::1|40001|\r\n"},
		{true, v6, "EPRT |2|2001:db8::1|40001|\r\n"},
		{false, netip.MustParseAddrPort("[::ffff:203.0.113.1]:40000"), "PORT 203,0,113,1,156,64\r\n"},
	} {
		got := string(command{eprt: row.eprt, end: "\r\n"}.with(row.at))
		if got != row.want {
			t.Errorf("%v with %v: %q, want %q", row.eprt, row.at, got, row.want)
		}
		if c, ok := parse([]byte(got)); !ok || c.at.Port() != row.at.Port() || c.at.Addr() != row.at.Addr().Unmap() {
			t.Errorf("%q is parsed as %v, %v", got, c, ok)
		}
	}
}

// program is the program's end of a control connection, and the Server.
type program struct {
	flow.Stream
	up         []byte
	fin, reset bool
	ready      int

	asked  []netip.AddrPort
	bound  func(netip.AddrPort)
	now    netip.AddrPort // the answer that comes at once, if atOnce
	atOnce bool
	closed int
}

func (p *program) ReadTo(w io.Writer) (int, error) {
	switch {
	case p.reset:
		return 0, flow.ErrReset
	case len(p.up) == 0 && p.fin:
		return 0, io.EOF
	case len(p.up) == 0:
		return 0, flow.ErrAgain
	}
	n, _ := w.Write(p.up)
	p.up = p.up[n:]
	return n, nil
}

func (p *program) Close() error           { return nil }
func (p *program) Flow() flow.Flow        { return flow.Flow{} }
func (p *program) OnCancel(func())        {}
func (p *program) Reject(flow.Refusal)    {}
func (p *program) Accept(l flow.Listener) { l.Opened(p, nil) }
func (p *program) Mine(at netip.AddrPort) bool {
	return at.Addr() == flow.TUN4 || at.Addr() == flow.TUN6
}

func (p *program) Listen(at netip.AddrPort, bound func(netip.AddrPort)) {
	p.asked, p.bound = append(p.asked, at), bound
	if p.atOnce {
		bound(p.now)
	}
}

// server is what the Server sees of Close, which the stream has, too.
type server struct{ *program }

func (s server) Close() { s.closed++ }

type taker struct {
	p *program
	s flow.Stream
}

func (k *taker) Opened(s flow.Stream, _ error) { k.s = s }
func (k *taker) Ready(flow.Events)             { k.p.ready++ }

func open(p *program) flow.Stream {
	k := &taker{p: p}
	Wrap(p, server{p}).Accept(k)
	return k.s
}

// narrow takes up to n bytes at a time.
type narrow struct {
	bytes.Buffer
	n int
}

func (w *narrow) Write(b []byte) (int, error) {
	n := min(len(b), w.n)
	w.Buffer.Write(b[:n])
	if n < len(b) {
		return n, io.ErrShortWrite
	}
	return n, nil
}

// drain reads until there is an error, as the relay does.
func drain(t *testing.T, s flow.Stream, w io.Writer) error {
	t.Helper()
	for range 1 << 20 {
		if _, err := s.ReadTo(w); err != nil {
			return err
		}
	}
	t.Fatal("it does not end")
	return nil
}

var outer = netip.MustParseAddrPort("203.0.113.1:40000")

// A command waits for its endpoint, and what follows waits with it. Everything else passes at once and unchanged.
func TestStream(t *testing.T) {
	for _, width := range []int{1, 7, 1 << 16} {
		p := &program{}
		s := open(p)
		w := &narrow{n: width}
		p.up = []byte("USER x\r\nPA")
		if err := drain(t, s, w); err != flow.ErrAgain || w.String() != "USER x\r\nPA" {
			t.Fatalf("%q, %v", w.String(), err)
		}
		p.up = []byte("SS PORT 198,18,0,1,4,1\r\nPO")
		if _ = drain(t, s, w); !strings.HasSuffix(w.String(), "4,1\r\n") || len(p.asked) != 0 {
			t.Fatalf("%q, %v", w.String(), p.asked)
		}
		p.up = []byte("RT 198,18,0,1,4,1\r\nLIST\r\n")
		w.Reset()
		if err := drain(t, s, w); err != flow.ErrAgain || w.Len() != 0 || len(p.asked) != 1 || p.asked[0].Port() != 1025 {
			t.Fatalf("%q, %v, %v", w.String(), p.asked, err)
		}
		p.bound(outer)
		if p.ready != 1 {
			t.Error("nobody is told")
		}
		p.fin = true
		if err := drain(t, s, w); err != io.EOF || w.String() != "PORT 203,0,113,1,156,64\r\nLIST\r\n" {
			t.Fatalf("%q, %v", w.String(), err)
		}
		if _ = s.Close(); p.closed != 1 {
			t.Error("the Server is not closed")
		}
	}
}

// What cannot be rewritten or must not be.
func TestStreamPasses(t *testing.T) {
	long := "PORT " + strings.Repeat("1", 3*MaxLine) + "\r\n"
	const clear = "EPRT |2|fd76:6961:736f:636b::1|2000|\r\n"
	for _, row := range []struct{ name, say, want string }{
		{"another host", "PORT 203,0,113,9,4,1\r\n", ""},
		{"a long line", long + clear, long + "EPRT |1|203.0.113.1|40000|\r\n"},
		{"TLS", "AUTH TLS\r\n\x16\x03\x01" + "\n" + clear, ""},
		{"AUTH that was refused", "AUTH TLS\r\n" + clear, "AUTH TLS\r\nEPRT |1|203.0.113.1|40000|\r\n"},
		{"the end in a line", "PORT 198,18,0,1,4,1", ""},
		{"two", clear + clear, strings.Repeat("EPRT |1|203.0.113.1|40000|\r\n", 2)},
		{"ABOR", "\xff\xf4\xff\xf2ABOR\r\nport 198,18,0,1,4,1\n", "\xff\xf4\xff\xf2ABOR\r\nPORT 203,0,113,1,156,64\n"},
	} {
		if row.want == "" {
			row.want = row.say
		}
		p := &program{up: []byte(row.say), fin: true, now: outer, atOnce: true}
		w := &narrow{n: 1 << 16}
		if err := drain(t, open(p), w); err != io.EOF || w.String() != row.want {
			t.Errorf("%s: %q, %v", row.name, w.String(), err)
		}
	}
}

// Without an endpoint the command loses its argument, so that the server refuses it.
func TestStreamRefused(t *testing.T) {
	p := &program{up: []byte("EPRT |1|198.18.0.1|2000|\r\nPORT 198,18,0,1,4,1\r\nPASV\r\n"), fin: true, atOnce: true}
	w := &narrow{n: 1 << 16}
	if err := drain(t, open(p), w); err != io.EOF || w.String() != "EPRT\r\nPORT\r\nPASV\r\n" {
		t.Errorf("%q, %v", w.String(), err)
	}
}

// The program's RST is seen while its command waits, and little is held of a program that goes on.
func TestStreamWaits(t *testing.T) {
	p := &program{up: append([]byte("PORT 198,18,0,1,4,1\r\n"), make([]byte, 1<<20)...)}
	s := open(p)
	w := &narrow{n: 1 << 16}
	if err := drain(t, s, w); err != flow.ErrAgain || len(p.up) < 1<<20-maxRead {
		t.Errorf("%d bytes are left, %v", len(p.up), err)
	}
	p.reset = true
	if err := drain(t, s, w); !errors.Is(err, flow.ErrReset) || w.Len() != 0 {
		t.Errorf("%q, %v", w.String(), err)
	}
}

// Whatever a program says, in pieces of any size, it arrives as said if it has no command of ours; nothing is held without
// limit.
func FuzzStream(f *testing.F) {
	f.Add([]byte("USER x\r\nPORT 203,0,113,9,4,1\r\nEPRT |1|203.0.113.9|6275|\r\nPORTAUTH TLS\r\n\x16\x03"), uint8(3), uint8(2))
	f.Add([]byte("PORT "+strings.Repeat("1", 600)), uint8(255), uint8(1))
	f.Fuzz(func(t *testing.T, say []byte, piece, width uint8) {
		p := &program{atOnce: true, now: outer}
		s := open(p).(*stream)
		w := &narrow{n: int(width) + 1}
		for rest := say; len(rest) > 0; {
			n := min(int(piece)+1, len(rest))
			p.up, rest = append(p.up, rest[:n]...), rest[n:]
			if err := drain(t, s, w); err != flow.ErrAgain {
				t.Fatal(err)
			}
			if len(s.scan.in) >= MaxLine || len(s.out) > 0 {
				t.Fatalf("%d and %d bytes are held", len(s.scan.in), len(s.out))
			}
		}
		p.fin = true
		if err := drain(t, s, w); err != io.EOF {
			t.Fatal(err)
		}
		if len(p.asked) == 0 && !bytes.Equal(w.Bytes(), say) {
			t.Fatalf("%q became %q", say, w.Bytes())
		}
	})
}
