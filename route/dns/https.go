package dns

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
)

const (
	mediaType     = "application/dns-message" // RFC 8484, section 6
	maxHTTPHeader = 16 << 10
)

// Limits of what is buffered before it is read.
const (
	streamBuffer = 128 << 10 // more than the longest answer, in pieces of any size
	clientBuffer = 1 << 20
)

// httpsLink is an HTTP/2 connection to a resolver (RFC 8484). Each question is a stream of it with a goroutine. There
// are at most as many as questions in progress.
type httpsLink struct {
	x      *exchange
	of     *resolver
	raw    net.Conn // below TLS: closing it ends everything
	client *http.ClientConn
	url    *url.URL
	ctx    context.Context // of the questions
	cancel context.CancelFunc
	ended  chan struct{} // the client reports that the connection can no longer be used
	wg     sync.WaitGroup
}

// newHTTPClient speaks HTTP/2 over c. It takes ownership of c unless it returns an error.
func newHTTPClient(ctx context.Context, r Resolver, c *tls.Conn) (*http.ClientConn, error) {
	if p := c.ConnectionState().NegotiatedProtocol; p != "h2" {
		return nil, errors.New("it does not speak HTTP/2 (RFC 8484, section 5.2)")
	}
	t := &http.Transport{
		DialTLSContext:         func(context.Context, string, string) (net.Conn, error) { return c, nil },
		Protocols:              new(http.Protocols),
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxHTTPHeader,
		HTTP2: &http.HTTP2Config{MaxReceiveBufferPerStream: streamBuffer,
			MaxReceiveBufferPerConnection: clientBuffer},
	}
	t.Protocols.SetHTTP2(true)
	client, err := t.NewClientConn(ctx, "https", r.host())
	if err != nil {
		return nil, fmt.Errorf("the HTTP/2 connection failed: %w", err)
	}
	return client, nil
}

// newHTTPSLink takes ownership of the connection of d.
func newHTTPSLink(d *dialed, x *exchange) *httpsLink {
	h := &httpsLink{x: x, of: d.r, raw: d.raw, client: d.http, url: d.r.url(), ended: make(chan struct{}, 1)}
	h.ctx, h.cancel = context.WithCancel(context.Background())
	h.client.SetStateHook(func(c *http.ClientConn) {
		if c.Err() != nil {
			select {
			case h.ended <- struct{}{}:
			default:
			}
		}
	})
	h.wg.Go(h.watch)
	return h
}

func (h *httpsLink) resolver() *resolver { return h.of }

func (h *httpsLink) close() {
	h.cancel()
	_ = h.raw.Close() // first, because the client would wait to send a close message
	_ = h.client.Close()
}

func (h *httpsLink) wait() { h.wg.Wait() }

// watch reports the end of a connection that is not in use.
func (h *httpsLink) watch() {
	select {
	case <-h.ctx.Done():
	case <-h.ended:
		h.post(message{err: errors.New("it closed the connection")})
	}
}

func (h *httpsLink) post(m message) {
	m.link = h
	select {
	case h.x.msgs <- m:
	case <-h.ctx.Done():
	}
}

// send begins an exchange for q. RFC 8484, section 4.1, asks for the ID 0 so that answers can be cached.
func (h *httpsLink) send(q *query) bool {
	msg := append([]byte(nil), q.msg()...)
	id := binary.BigEndian.Uint16(msg)
	binary.BigEndian.PutUint16(msg, 0)
	deadline := q.deadline
	h.wg.Go(func() {
		ctx, cancel := context.WithDeadline(h.ctx, deadline)
		defer cancel()
		resp, failed, err := h.exchange(ctx, msg)
		switch {
		case ctx.Err() != nil: // exchange.run knows
		case err != nil:
			h.post(message{err: err})
		case failed != nil:
			h.post(message{err: failed, only: true, id: id})
		default:
			binary.BigEndian.PutUint16(resp, id)
			h.post(message{msg: resp})
		}
	})
	return true
}

// exchange asks and returns the answer, or in failed why this question has none, or in err why the connection is
// useless.
func (h *httpsLink) exchange(ctx context.Context, msg []byte) (resp []byte, failed, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "", bytes.NewReader(msg))
	if err != nil {
		return nil, nil, err
	}
	req.URL = h.url
	// it reveals nothing about the client
	req.Header = http.Header{"Content-Type": {mediaType}, "Accept": {mediaType}, "User-Agent": nil}
	r, err := h.client.RoundTrip(req)
	if err != nil {
		return nil, nil, err
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("it answers with HTTP status %d", r.StatusCode), nil
	}
	if got := r.Header.Get("Content-Type"); got != mediaType {
		return nil, fmt.Errorf("it answers with %.64q, which is not %s", got, mediaType), nil
	}
	resp, err = io.ReadAll(io.LimitReader(r.Body, maxMessage+1))
	switch {
	case err != nil:
		return nil, nil, err
	case len(resp) < headerLen || len(resp) > maxMessage:
		return nil, errors.New("it answers with a message that is too short or too long"), nil
	case resp[0] != 0 || resp[1] != 0:
		return nil, errors.New("it answers another question"), nil
	}
	return resp, nil, nil
}
