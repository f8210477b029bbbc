package sniff

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// wire is a connection that keeps what is written to it, and reads from r.
type wire struct {
	r   io.Reader
	out bytes.Buffer
}

func (w *wire) Read(b []byte) (int, error)     { return w.r.Read(b) }
func (w *wire) Write(b []byte) (int, error)    { return w.out.Write(b) }
func (*wire) Close() error                     { return nil }
func (*wire) LocalAddr() net.Addr              { return nil }
func (*wire) RemoteAddr() net.Addr             { return nil }
func (*wire) SetDeadline(time.Time) error      { return nil }
func (*wire) SetReadDeadline(time.Time) error  { return nil }
func (*wire) SetWriteDeadline(time.Time) error { return nil }

// hello is what a TLS client of the standard library sends first.
func hello(t testing.TB, c *tls.Config) []byte {
	t.Helper()
	w := &wire{r: strings.NewReader("")}
	c.InsecureSkipVerify = true
	_ = tls.Client(w, c).Handshake()
	if w.out.Len() == 0 {
		t.Fatal("no ClientHello")
	}
	return w.out.Bytes()
}

// inRecords is a ClientHello of one record in records of at most n bytes.
func inRecords(b []byte, n int) (out []byte) {
	for rest := b[recordHead:]; len(rest) > 0; {
		part := rest[:min(n, len(rest))]
		out = append(append(out, b[0], b[1], b[2], byte(len(part)>>8), byte(len(part))), part...)
		rest = rest[len(part):]
	}
	return out
}

// bySteps gives Name b as it comes in segments of n bytes, and no more often than it asks for.
func bySteps(t testing.TB, b []byte, n int) (name string, need int) {
	t.Helper()
	need = 1
	for have := n; ; have += n {
		have = min(have, len(b))
		if have >= need {
			before := need
			if name, need = Name(b[:have]); need == 0 || need > MaxBytes {
				return name, need
			}
			if need <= have || need < before || name != "" {
				t.Fatalf("with %d bytes: name %q, and %d are needed", have, name, need)
			}
		}
		if have == len(b) {
			return name, need
		}
	}
}

func TestNameTLS(t *testing.T) {
	for what, c := range map[string]*tls.Config{
		"1.3":       {ServerName: "www.example.com"},
		"1.2":       {ServerName: "www.example.com", MaxVersion: tls.VersionTLS12},
		"many ALPN": {ServerName: "www.example.com", NextProtos: strings.Split(strings.Repeat("h2 http/1.1 ", 300), " ")[:600]},
	} {
		b := hello(t, c)
		for _, n := range []int{1, 7, 100, 536, 1448, len(b)} {
			if name, need := bySteps(t, b, n); name != "www.example.com" || need != 0 {
				t.Errorf("%s by %d bytes: %q, %d", what, n, name, need)
			}
			if name, need := bySteps(t, inRecords(b, max(n, len(b)/maxRecords+1)), n); name != "www.example.com" || need != 0 {
				t.Errorf("%s in records of %d bytes: %q, %d", what, n, name, need)
			}
		}
		// What comes behind the ClientHello changes nothing.
		if name, _ := Name(append(bytes.Clone(b), "early data"...)); name != "www.example.com" {
			t.Errorf("%s with data behind: %q", what, name)
		}
	}
	if name, need := bySteps(t, hello(t, &tls.Config{}), 100); name != "" || need != 0 {
		t.Errorf("without a server name: %q, %d", name, need)
	}
}

func TestNameOther(t *testing.T) {
	b := hello(t, &tls.Config{ServerName: "www.example.com"})
	for what, row := range map[string]struct {
		b    string
		name string
		need int
	}{
		"nothing":                {"", "", 1},
		"a byte of TLS":          {"\x16", "", 5},
		"a record head":          {"\x16\x03\x01\x00\x20", "", 9},
		"an empty record":        {"\x16\x03\x01\x00\x00", "", 0},
		"a record too long":      {"\x16\x03\x01\x40\x01", "", 0},
		"SSL 2":                  {"\x16\x02\x01\x00\x20", "", 0},
		"a ServerHello":          {"\x16\x03\x01\x00\x20\x02", "", 0},
		"an alert":               {"\x15\x03\x01\x00\x02\x02\x28", "", 0},
		"a hello of 64 KiB":      {"\x16\x03\x01\x40\x00\x01\x00\xff\xff", "", MaxBytes + 1},
		"a hello of 16 MiB":      {"\x16\x03\x01\x40\x00\x01\xff\xff\xff", "", MaxBytes + 1},
		"a hello of nothing":     {"\x16\x03\x01\x00\x04\x01\x00\x00\x00", "", 0},
		"too many records":       {string(inRecords(b, 1)), "", 0},
		"an alert in the middle": {string(inRecords(b, 100)[:105]) + "\x15\x03\x01\x00\x02", "", 0},
		"SSH":                    {"SSH-2.0-OpenSSH_9.2p1\r\n", "", 0},
		"BitTorrent":             {"\x13BitTorrent protocol", "", 0},
		"small letters":          {"get / HTTP/1.1\r\nHost: a.example\r\n\r\n", "", 0},
		"a method":               {"GE", "", 3},
		"no method":              {strings.Repeat("A", maxMethod), "", 0},
		"a head without an end":  {"GET / HTTP/1.1\r\nHost: a.example\r\n", "", 34},
		"GET":                    {"GET / HTTP/1.1\r\nHost: a.Example\r\n\r\n", "a.Example", 0},
		"with a port":            {"POST /x HTTP/1.1\r\nA: b\r\nhost:a.example:8080 \r\n\r\nbody", "a.example", 0},
		"bare line feeds":        {"GET / HTTP/1.0\nHost: a.example\n\n", "a.example", 0},
		"HTTP 1.0":               {"GET / HTTP/1.0\r\n\r\n", "", 0},
		"two hosts":              {"GET / HTTP/1.1\r\nHost: a.example\r\nHost: b.example\r\n\r\n", "", 0},
		"an address of IPv6":     {"GET / HTTP/1.1\r\nHost: [2001:db8::1]:80\r\n\r\n", "", 0},
		"to a proxy":             {"GET http://a.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n", "", 0},
		"CONNECT":                {"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n", "", 0},
		"HTTP/2":                 {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "", 0},
		"OPTIONS *":              {"OPTIONS * HTTP/1.1\r\nHost: a.example\r\n\r\n", "a.example", 0},
		"FTP":                    {"USER anonymous\r\n", "", 0},
		"a field without a name": {"GET / HTTP/1.1\r\n: x\r\n\r\n", "", 0},
	} {
		if name, need := Name([]byte(row.b)); name != row.name || need != row.need {
			t.Errorf("%s: %q, %d; want %q, %d", what, name, need, row.name, row.need)
		}
	}
}

var errStop = errors.New("stop")

// theirName is the server name that the standard library reads; ok: it takes b for a ClientHello.
func theirName(b []byte) (name string, ok bool) {
	_ = tls.Server(&wire{r: bytes.NewReader(b)}, &tls.Config{
		GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			name, ok = h.ServerName, true
			return nil, errStop
		},
	}).Handshake()
	return name, ok
}

// Whatever comes: what is read does not depend on how it is cut, asks for more in small numbers of looks, and where the
// standard library reads a server name it is this one.
func FuzzName(f *testing.F) {
	b := hello(f, &tls.Config{ServerName: "www.example.com", MaxVersion: tls.VersionTLS12})
	f.Add(b)
	f.Add(inRecords(b, 50))
	f.Add(hello(f, &tls.Config{}))
	f.Add([]byte("GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"))
	f.Add([]byte("CONNECT a.example:443 HTTP/1.1\r\nHost: a.example\r\n\r\n"))
	f.Add([]byte("SSH-2.0-x\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		b = b[:min(len(b), MaxBytes)]
		name, need := Name(b)
		if need != 0 && (need <= len(b) || name != "") || len(name) > len(b) {
			t.Fatalf("%d bytes: name %q, and %d are needed", len(b), name, need)
		}
		if n, m := bySteps(t, b, 97); len(b) > 0 && need == 0 && (n != name || m != 0) {
			t.Errorf("%q at once, by steps %q, %d", name, n, m)
		}
		if len(b) == 0 || b[0] != recordHandshake || need != 0 {
			return
		}
		if theirs, ok := theirName(b); ok && theirs != name && name != theirs+"." && bytes.Count(b, []byte{3}) < maxRecords {
			t.Errorf("%q, the standard library reads %q", name, theirs)
		}
	})
}

// Looks at a hello that comes byte by byte cost little, however it is cut.
func TestNameWork(t *testing.T) {
	b := inRecords(hello(t, &tls.Config{ServerName: "www.example.com"}), 30)
	big := append([]byte("GET / HTTP/1.1\r\nX: "), bytes.Repeat([]byte("x"), MaxBytes)...)[:MaxBytes]
	start := time.Now()
	for _, b := range [][]byte{b, big} {
		bySteps(t, b, 1)
	}
	if took := time.Since(start); took > 5*time.Second { // some 10 ms
		t.Errorf("it took %v", took)
	}
}

func BenchmarkName(b *testing.B) {
	for what, msg := range map[string][]byte{
		"tls": hello(b, &tls.Config{ServerName: "www.example.com"}), "http": []byte("GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"),
	} {
		b.Run(what, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				Name(msg)
			}
		})
	}
}
