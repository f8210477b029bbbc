package dns

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/viasocks/viasocks/stack/testkit"
)

// testCA signs certificates, and is the only one that the tests trust.
type testCA struct {
	key   *ecdsa.PrivateKey
	cert  *x509.Certificate
	roots *x509.CertPool
}

func newAuthority(t *testing.T) *testCA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	a := &testCA{key: key, roots: x509.NewCertPool()}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.roots.AddCert(a.cert)
	return a
}

// certificate is one for a name, or for an address.
func (a *testCA) certificate(t *testing.T, host string, until time.Time) *tls.Config {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: until}
	if ip := net.ParseIP(host); ip != nil {
		template.IPAddresses = []net.IP{ip}
	} else {
		template.DNSNames = []string{host}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &a.key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: a.key}}}
}

// valid is a certificate for 127.0.0.1.
func (a *testCA) valid(t *testing.T) *tls.Config {
	return a.certificate(t, "127.0.0.1", time.Now().Add(time.Hour))
}

// overTLS is a resolver inside TLS.
func (a *testCA) overTLS(t *testing.T, c *tls.Config, answer func([]byte) []byte) Resolver {
	f := serveResolver(t, tls.NewListener(listen(t), c), answer)
	return Resolver{Kind: TLS, Addr: f.addr()}
}

// overHTTPS is a web server with a certificate for 127.0.0.1.
func (a *testCA) overHTTPS(t *testing.T, h http.HandlerFunc) (Resolver, *httptest.Server) {
	s := httptest.NewUnstartedServer(h)
	s.EnableHTTP2 = true
	s.TLS = a.valid(t)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	return Resolver{Kind: HTTPS, Addr: s.Listener.Addr().(*net.TCPAddr).AddrPort(), Path: "/dns-query"}, s
}

func answerHTTP(w http.ResponseWriter, b []byte) {
	w.Header().Set("Content-Type", "application/dns-message")
	_, _ = w.Write(b)
}

// askMany asks n different questions at once, each of which must get the answer to it.
func askMany(t *testing.T, s *Server, n int) {
	t.Helper()
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			name := fmt.Sprintf("n%d.example.", i)
			var m dnsmessage.Message
			if err := m.Unpack(ask(t, s, makeQuestion(t, name, 0, nil))); err != nil || m.ID != 0x1234 || m.RCode != 0 ||
				m.Questions[0].Name.String() != name || len(m.Answers) != 1 {
				t.Errorf("%s: %v %+v", name, err, m)
			}
		})
	}
	wg.Wait()
}

func TestPipelineInsideTLS(t *testing.T) {
	testkit.CheckLeaks(t)
	ca := newAuthority(t)
	r := ca.overTLS(t, ca.valid(t), func(q []byte) []byte { return makeAnswer(t, q, 1) })
	s := start(t, Config{Resolvers: []Resolver{r}, RootCAs: ca.roots})
	askMany(t, s, 100)
	if st := s.Stats(); st.Answered != 100 || st.Connections != 1 {
		t.Errorf("%+v", st)
	}
}

// TestOutOfOrder: a resolver answers what it knows first, and the last question first of all.
func TestOutOfOrder(t *testing.T) {
	testkit.CheckLeaks(t)
	ca := newAuthority(t)
	for _, c := range []*tls.Config{nil, ca.valid(t)} {
		l, r := listen(t), Resolver{}
		if c != nil {
			l, r.Kind = tls.NewListener(l, c), TLS
		}
		r.Addr = l.Addr().(*net.TCPAddr).AddrPort()
		const n = 20
		var wg sync.WaitGroup
		wg.Go(func() {
			conn, err := l.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			var all [][]byte
			for range n {
				var length [2]byte
				if _, err := io.ReadFull(conn, length[:]); err != nil {
					t.Error(err)
					return
				}
				q := make([]byte, binary.BigEndian.Uint16(length[:]))
				if _, err := io.ReadFull(conn, q); err != nil {
					t.Error(err)
					return
				}
				all = append(all, makeAnswer(t, q, 1))
			}
			for i := n - 1; i >= 0; i-- {
				if _, err := conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(all[i]))), all[i]...)); err != nil {
					t.Error(err)
				}
			}
			_, _ = conn.Read(make([]byte, 1)) // until the other end closes
		})
		t.Cleanup(func() { l.Close(); wg.Wait() })
		s := start(t, Config{Resolvers: []Resolver{r}, RootCAs: ca.roots})
		askMany(t, s, n)
	}
}

func TestHTTPS(t *testing.T) {
	testkit.CheckLeaks(t)
	ca := newAuthority(t)
	var conns sync.Map
	r, _ := ca.overHTTPS(t, func(w http.ResponseWriter, req *http.Request) {
		q, err := io.ReadAll(req.Body)
		if err != nil || req.Method != "POST" || req.ProtoMajor != 2 || req.URL.RequestURI() != "/dns-query?a=b" ||
			req.Header.Get(
				"Content-Type",
			) != "application/dns-message" || req.Header.Get("Accept") != "application/dns-message" ||
			req.UserAgent() != "" || len(q) < headerLen || q[0] != 0 || q[1] != 0 {
			t.Errorf("asked %s %s %s %v, %x, %v", req.Method, req.Proto, req.URL.RequestURI(), req.Header, q, err)
		}
		conns.Store(req.RemoteAddr, true)
		testkit.Pace(20 * time.Millisecond) // so that there are many at a time
		answerHTTP(w, makeAnswer(t, q, 1))
	})
	r.Path += "?a=b"
	s := start(t, Config{Resolvers: []Resolver{r}, RootCAs: ca.roots})
	askMany(t, s, 300) // more than the streams that Go's server allows
	n := 0
	conns.Range(func(any, any) bool { n++; return true })
	if st := s.Stats(); st.Answered != 300 || st.Connections != 1 || n != 1 {
		t.Errorf("%+v, %d connections", st, n)
	}
}

// TestCertificates: only a certificate that is valid for the resolver is taken, and the question goes to the next one else.
func TestCertificates(t *testing.T) {
	testkit.CheckLeaks(t)
	ca, other := newAuthority(t), newAuthority(t)
	hour := time.Now().Add(time.Hour)
	good := newFakeResolver(t, func(q []byte) []byte { return makeAnswer(t, q, 2) })
	for name, tt := range map[string]struct {
		cert *tls.Config
		name string
		take bool
	}{
		"address":         {ca.valid(t), "", true},
		"name":            {ca.certificate(t, "dns.example", hour), "dns.example", true},
		"another address": {ca.certificate(t, "127.0.0.2", hour), "", false},
		"another name":    {ca.certificate(t, "dns.example", hour), "dns2.example", false},
		"no name":         {ca.certificate(t, "dns.example", hour), "", false},
		"nobody's":        {other.valid(t), "", false},
		"expired":         {ca.certificate(t, "127.0.0.1", time.Now().Add(-time.Minute)), "", false},
	} {
		var asked atomic.Int32
		r := ca.overTLS(t, tt.cert, func(q []byte) []byte { asked.Add(1); return makeAnswer(t, q, 1) })
		r.Name = tt.name
		s := start(t, Config{Resolvers: []Resolver{r, OverTCP(good.addr())}, RootCAs: ca.roots})
		var m dnsmessage.Message
		if err := m.Unpack(ask(t, s, makeQuestion(t, "a.", 0, nil))); err != nil {
			t.Fatal(err)
		}
		if took := len(m.Answers) == 1; took != tt.take || (asked.Load() == 1) != tt.take {
			t.Errorf("%s: taken %v, want %v; it was asked %d questions", name, took, tt.take, asked.Load())
		}
	}
}

// TestBadServers: whatever a resolver does inside TLS, the next one is asked, and nothing is left over.
func TestBadServers(t *testing.T) {
	testkit.CheckLeaks(t)
	ca := newAuthority(t)
	good := newFakeResolver(t, func(q []byte) []byte { return makeAnswer(t, q, 2) })
	plain := newFakeResolver(t, func([]byte) []byte { return []byte{} })
	tarpit := listen(t) // the kernel accepts, and nobody reads
	t.Cleanup(func() { tarpit.Close() })
	old, _ := ca.overHTTPS(t, nil)
	{
		s := httptest.NewUnstartedServer(http.NotFoundHandler())
		s.TLS = ca.valid(t)
		s.StartTLS() // without HTTP/2
		t.Cleanup(s.Close)
		old.Addr = s.Listener.Addr().(*net.TCPAddr).AddrPort()
	}
	bad := map[string]Resolver{
		"no TLS":           {Kind: TLS, Addr: plain.addr()},
		"silent handshake": {Kind: TLS, Addr: tarpit.Addr().(*net.TCPAddr).AddrPort()},
		"silent for HTTPS": {Kind: HTTPS, Addr: tarpit.Addr().(*net.TCPAddr).AddrPort(), Path: "/"},
		"closes":           ca.overTLS(t, ca.valid(t), func([]byte) []byte { return []byte{} }),
		"silent":           ca.overTLS(t, ca.valid(t), func([]byte) []byte { return nil }),
		"short message":    ca.overTLS(t, ca.valid(t), func([]byte) []byte { return []byte("x") }),
		"HTTP/1.1 only":    old,
	}
	for name, h := range badWebServers(t) {
		bad[name], _ = ca.overHTTPS(t, h)
	}
	for name, r := range bad {
		s := start(t, Config{Resolvers: []Resolver{r, OverTCP(good.addr())}, RootCAs: ca.roots, Timeout: 4 * time.Second})
		for range 2 { // the second one asks the good one at once
			var m dnsmessage.Message
			if err := m.Unpack(ask(t, s, makeQuestion(t, "a.", 0, nil))); err != nil || len(m.Answers) != 2 {
				t.Errorf("%s: %v %+v", name, err, m.Header)
			}
		}
		if st := s.Stats(); st.Answered != 2 {
			t.Errorf("%s: %+v", name, st)
		}
	}
}

// badWebServers are web servers of which none answers a question.
func badWebServers(t *testing.T) map[string]http.HandlerFunc {
	t.Helper()
	gate := make(chan struct{})
	t.Cleanup(func() { close(gate) })
	return map[string]http.HandlerFunc{
		"not found": http.NotFound,
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://127.0.0.1:1/", http.StatusTemporaryRedirect)
		},
		"no content": func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusNoContent) },
		"a page":     func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write([]byte("<html></html>")) },
		"empty":      func(w http.ResponseWriter, r *http.Request) { answerHTTP(w, nil) },
		"endless":    endlessAnswer(t),
		"long header": func(w http.ResponseWriter, r *http.Request) {
			q, _ := io.ReadAll(r.Body)
			w.Header().Set("X", strings.Repeat("x", 2*maxHTTPHeader))
			answerHTTP(w, makeAnswer(t, q, 1))
		},
		"stops": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "100")
			answerHTTP(w, make([]byte, 50))
			panic(http.ErrAbortHandler)
		},
		"slow": func(w http.ResponseWriter, r *http.Request) {
			answerHTTP(w, make([]byte, 5))
			w.(http.Flusher).Flush()
			select {
			case <-r.Context().Done():
			case <-gate:
			}
		},
		"another ID": func(w http.ResponseWriter, r *http.Request) {
			q, _ := io.ReadAll(r.Body)
			a := makeAnswer(t, q, 1)
			a[1] = 1
			answerHTTP(w, a)
		},
	}
}

// endlessAnswer writes as much as is taken, of which there may be only a little when the test is over.
func endlessAnswer(t *testing.T) http.HandlerFunc {
	t.Helper()
	var endless atomic.Int64 // bytes that were taken
	t.Cleanup(func() {
		if n := endless.Load(); n == 0 || n > 4*clientBuffer {
			t.Errorf("%d bytes of an endless answer were taken", n)
		}
	})
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/dns-message")
		for r.Context().Err() == nil {
			n, err := w.Write(make([]byte, 1<<16))
			endless.Add(int64(n))
			if err != nil {
				return
			}
		}
	}
}

// TestServerClosesHTTPS: a connection that the server ends while nobody asks is given up, and the next question gets another.
func TestServerClosesHTTPS(t *testing.T) {
	testkit.CheckLeaks(t)
	ca := newAuthority(t)
	r, server := ca.overHTTPS(t, func(w http.ResponseWriter, req *http.Request) {
		q, _ := io.ReadAll(req.Body)
		answerHTTP(w, makeAnswer(t, q, 1))
	})
	s := start(t, Config{Resolvers: []Resolver{r}, RootCAs: ca.roots})
	for range 3 {
		askMany(t, s, 1)
		server.CloseClientConnections()
	}
	if st := s.Stats(); st.Answered != 3 || st.Connections != 3 {
		t.Errorf("%+v", st)
	}
}

// TestIdleCloseInsideTLS: a connection that nobody uses is closed.
func TestIdleCloseInsideTLS(t *testing.T) {
	testkit.CheckLeaks(t)
	ca := newAuthority(t)
	var closed atomic.Int32
	web := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		q, _ := io.ReadAll(req.Body)
		answerHTTP(w, makeAnswer(t, q, 1))
	}))
	web.EnableHTTP2, web.TLS = true, ca.valid(t)
	web.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateClosed {
			closed.Add(1)
		}
	}
	web.StartTLS()
	t.Cleanup(web.Close)
	f := serveResolver(t, tls.NewListener(listen(t), ca.valid(t)), func(q []byte) []byte { return makeAnswer(t, q, 1) })
	for r, ended := range map[Resolver]*atomic.Int32{
		{Kind: HTTPS, Addr: web.Listener.Addr().(*net.TCPAddr).AddrPort(), Path: "/"}: &closed,
		{Kind: TLS, Addr: f.addr()}: &f.ended,
	} {
		s := start(t, Config{Resolvers: []Resolver{r}, RootCAs: ca.roots, IdleClose: 200 * time.Millisecond})
		for i := range int32(2) {
			askMany(t, s, 1)
			if !testkit.Until(testkit.Patience, func() bool { return ended.Load() == i+1 }) {
				t.Fatalf("%s: %d connections ended", r, ended.Load())
			}
		}
	}
}

// TestAllDown: while no resolver answers, one question at a time waits, and the others are told at once.
func TestAllDown(t *testing.T) {
	testkit.CheckLeaks(t)
	var works atomic.Bool
	f := newFakeResolver(t, func(q []byte) []byte {
		if !works.Load() {
			return nil
		}
		return makeAnswer(t, q, 1)
	})
	s := start(t, Config{Resolvers: []Resolver{OverTCP(f.addr())}, Timeout: time.Second})
	if rc := rcodeOf(t, ask(t, s, makeQuestion(t, "a.", 0, nil))); rc != dnsmessage.RCodeServerFailure {
		t.Fatal(rc)
	}
	testkit.Pace(2 * tryAgain) // the time of the next trial has come
	begin := time.Now()
	trial := make(chan time.Time, 1)
	s.Handle(makeQuestion(t, "b.", 0, nil), netip.AddrPort{}, func([]byte) { trial <- time.Now() })
	for range 20 {
		if rc := rcodeOf(t, ask(t, s, makeQuestion(t, "c.", 0, nil))); rc != dnsmessage.RCodeServerFailure {
			t.Fatal(rc)
		}
	}
	all := time.Now()
	if tried := <-trial; tried.Before(all) {
		t.Errorf("20 questions were told after %v, and the one that tries after %v", all.Sub(begin), tried.Sub(begin))
	}
	works.Store(true)
	testkit.Eventually(t, "another trial", func() bool { return rcodeOf(t, ask(t, s, makeQuestion(t, "d.", 0, nil))) == 0 })
	askMany(t, s, 20)
}

// TestSlowDial: a dial that takes longer than a question has goes on, and what comes meanwhile is told at once.
func TestSlowDial(t *testing.T) {
	testkit.CheckLeaks(t)
	f := newFakeResolver(t, func(q []byte) []byte { return makeAnswer(t, q, 1) })
	gate, dials := make(chan struct{}), atomic.Int32{}
	open := sync.OnceFunc(func() { close(gate) })
	s := start(t, Config{Resolvers: []Resolver{OverTCP(f.addr())}, Timeout: 300 * time.Millisecond,
		Dial: func(ctx context.Context, r Resolver, done func(int, error)) {
			dials.Add(1)
			go func() {
				<-gate
				dialTCP(ctx, r, done)
			}()
		}})
	t.Cleanup(open) // a test that fails must not leave the dial waiting
	servfail := func(limit time.Duration) {
		t.Helper()
		begin := time.Now()
		if rc := rcodeOf(t, ask(t, s, makeQuestion(t, "a.", 0, nil))); rc != dnsmessage.RCodeServerFailure ||
			time.Since(begin) > limit {
			t.Errorf("%v after %v", rc, time.Since(begin))
		}
	}
	servfail(testkit.Patience)
	for range 20 { // together less than one question's time
		servfail(100 * time.Millisecond)
	}
	open()
	if !testkit.Until(testkit.Patience, func() bool { return rcodeOf(t, ask(t, s, makeQuestion(t, "b.", 0, nil))) == 0 }) {
		t.Fatal("the connection is not used")
	}
	if n := dials.Load(); n != 1 {
		t.Errorf("%d dials", n)
	}
}
