package doctor

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/conform"
	"github.com/viasocks/viasocks/route/dns"
	"github.com/viasocks/viasocks/socks"
)

// dnsTime limits the wait for a resolver. It is the time for which viasocks itself waits.
const dnsTime = 5 * time.Second

// resolvers tests the resolvers that the user has named, through the proxy.
func (p *proxy) resolvers(ctx context.Context, free conform.Prober) []Finding {
	cfg := p.a.h.cfg
	if cfg.DNSOff {
		return nil
	}
	if !cfg.NamesDNS {
		return []Finding{{Check: "DNS", Level: NotTested,
			Found: "No resolver was named. Names travel to the proxy (--dns fake); " +
				"resolvers are asked only for mail servers and the like.",
			Do: "--dns fake,tcp://ADDRESS tests the resolver at ADDRESS through the proxy"}}
	}
	var parts []func() []Finding
	for _, r := range cfg.DNS {
		parts = append(parts, func() []Finding { return []Finding{p.resolver(ctx, free, r)} })
	}
	return together(parts...)
}

func (p *proxy) resolver(ctx context.Context, free conform.Prober, r dns.Resolver) Finding {
	f := Finding{Check: "DNS", Level: Fault, Means: "Programs cannot look up names by it, and wait for each.",
		Do: "--dns fake, so that names travel to the proxy; or name another resolver with --dns"}
	if r.Kind == dns.Tor {
		return Finding{Check: "DNS", Level: NotTested, Found: "Tor itself resolves names."}
	}
	dst := socks.Addr{IP: r.Addr.Addr(), Port: r.Addr.Port()}
	if !dst.IP.IsValid() {
		dst.Name = r.Name
	}
	begun := time.Now()
	c, a := free.Open(ctx, dst, dnsTime)
	if c == nil {
		f.Found = fmt.Sprintf("The resolver %s cannot be reached through the proxy: %s.", r, answerWords(a, dnsTime))
		if a.Kind == conform.Refused && socks.Reply(a.Code) == socks.ReplyNotAllowed {
			f.Found = fmt.Sprintf("The proxy's rules refuse connections to the resolver %s (port %d).", r, dst.Port)
		}
		return f
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(dnsTime))
	rcode, err := p.askResolver(ctx, c, r)
	took := time.Since(begun)
	switch {
	case err != nil && isTimeout(err):
		f.Found = fmt.Sprintf("The resolver %s was reached through the proxy, and did not answer within %v.", r, dnsTime)
	case err != nil:
		f.Found = fmt.Sprintf("The resolver %s was reached through the proxy, and gave no answer: %v.", r, err)
	case rcode != 0:
		f.Found = fmt.Sprintf("The resolver %s refuses to answer (RCODE %d).", r, rcode)
	default:
		return Finding{
			Check: "DNS",
			Level: OK,
			Found: fmt.Sprintf("The resolver %s answers through the proxy after %s.", r, span(took)),
		}
	}
	return f
}

func answerWords(a conform.Answer, limit time.Duration) string {
	switch a.Kind {
	case conform.Refused:
		return replyWords(a.Code)
	case conform.Closed:
		return "it closes the connection"
	case conform.Reset:
		return "it resets the connection"
	case conform.Silence:
		return fmt.Sprintf("no answer within %v", limit)
	}
	return a.Error
}

func isTimeout(err error) bool {
	var t net.Error
	return errors.As(err, &t) && t.Timeout() || errors.Is(err, context.DeadlineExceeded)
}

var errAnswer = errors.New("the answer is not a DNS message")

// maxAnswer is the largest size of a DNS message.
const maxAnswer = 65535

// rootQuestion asks for the name servers of the root, which every resolver knows.
func rootQuestion() []byte {
	q := make([]byte, 12, 17)
	rand.Read(q[:2])
	q[2], q[5] = 1, 1               // recursion desired; one question
	return append(q, 0, 0, 2, 0, 1) // ".", NS, IN
}

// readAnswer returns the RCODE of an answer to q.
func readAnswer(q, b []byte) (rcode int, err error) {
	if len(b) < 12 || !bytes.Equal(b[:2], q[:2]) || b[2]&0x80 == 0 {
		return 0, errAnswer
	}
	return int(b[3] & 15), nil
}

// askResolver sends the question over c, a connection to the resolver.
func (p *proxy) askResolver(ctx context.Context, c net.Conn, r dns.Resolver) (rcode int, err error) {
	q := rootQuestion()
	name := r.Name
	if name == "" {
		name = r.Addr.Addr().String()
	}
	conf := &tls.Config{ServerName: name, RootCAs: p.a.h.cfg.DNSRoots, MinVersion: tls.VersionTLS12}
	switch r.Kind {
	case dns.HTTPS:
		return askHTTPS(ctx, c, conf, r, q)
	case dns.TLS:
		t := tls.Client(c, conf)
		if err := t.HandshakeContext(ctx); err != nil {
			return 0, err
		}
		c = t
	}
	if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(q))), q...)); err != nil {
		return 0, err
	}
	var length [2]byte
	if _, err := io.ReadFull(c, length[:]); err != nil {
		return 0, err
	}
	b := make([]byte, binary.BigEndian.Uint16(length[:]))
	if _, err := io.ReadFull(c, b); err != nil {
		return 0, err
	}
	return readAnswer(q, b)
}

func askHTTPS(ctx context.Context, c net.Conn, conf *tls.Config, r dns.Resolver, q []byte) (int, error) {
	tr := &http.Transport{
		DialContext:     func(context.Context, string, string) (net.Conn, error) { return c, nil },
		TLSClientConfig: conf, ForceAttemptHTTP2: true, DisableKeepAlives: true, MaxResponseHeaderBytes: 16 << 10,
	}
	defer tr.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, dnsTime)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+conf.ServerName+r.Path, bytes.NewReader(q))
	if err != nil {
		return 0, err
	}
	req.Header.Set("Content-Type", "application/dns-message")
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return 0, fmt.Errorf("its answer is %s", resp.Status)
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return 0, err
	}
	return readAnswer(q, b)
}
