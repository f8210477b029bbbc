package socks

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
)

const (
	// maxHTTPHead limits the total size of the heads of a proxy's answers, including interim ones.
	maxHTTPHead = 16 << 10
	// httpStatusLen is the length of the shortest status line without its line end: "HTTP/1.1 200".
	httpStatusLen = 12
)

// httpConnect is the Handshake of HTTP CONNECT (RFC 9110, section 9.3.6). Its phases are sendRequest → recvHead →
// granted.
type httpConnect struct {
	phase phase
	login bool   // the request carried credentials
	buf   []byte // the request, and later the head of the answer as far as it has arrived
	n     int    // bytes sent
	want  int    // bytes of buf after the head that Input lends
	total int    // bytes received, including the heads of interim answers
}

// newHTTP writes the request. It includes the credentials as Basic (RFC 7617), so that a proxy that wants them need
// not ask.
func newHTTP(l *login, cmd Command, dst Addr) (*httpConnect, error) {
	switch {
	case cmd == CmdAssociate:
		return nil, &inexpressible{protoHTTP, "UDP", ReplyCommandNotSupported}
	case cmd != CmdConnect:
		return nil, &inexpressible{protoHTTP, fmt.Sprintf("the command %d", byte(cmd)), ReplyCommandNotSupported}
	case strings.IndexFunc(dst.Name, notHostname) >= 0:
		return nil, &inexpressible{protoHTTP, "a name with characters that host names do not have", ReplyAddrTypeNotSupported}
	}
	if dst.Name == "" {
		dst.IP = dst.IP.Unmap()
	}
	at := dst.String()
	b := append(make([]byte, 0, 256), "CONNECT "+at+" HTTP/1.1\r\nHost: "+at+"\r\n"...)
	if l != nil {
		b = append(b, "Proxy-Authorization: Basic "...)
		b = base64.StdEncoding.AppendEncode(b, []byte(l.user+":"+l.pass))
		b = append(b, "\r\n"...)
	}
	return &httpConnect{phase: sendRequest, login: l != nil, buf: append(b, "\r\n"...)}, nil
}

// notHostname reports whether r must not appear in a name, where it could end the request line or add to it.
func notHostname(r rune) bool {
	return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '.' || r == '_')
}

// Output implements Handshake.
func (h *httpConnect) Output() []byte {
	if h.phase != sendRequest {
		return nil
	}
	return h.buf[h.n:]
}

// Sent implements Handshake.
func (h *httpConnect) Sent(n int) {
	if h.n += n; h.n == len(h.buf) {
		clear(h.buf) // do not keep the password in memory
		h.phase, h.buf = recvHead, h.buf[:0]
		h.expect()
	}
}

// expect asks for the smallest number of bytes that can complete the head. If it asked for more, bytes of the target
// could be among them. A line may end without a carriage return.
func (h *httpConnect) expect() {
	switch {
	case len(h.buf) < httpStatusLen:
		h.want = httpStatusLen + len("\n\n") - len(h.buf)
	case bytes.HasSuffix(h.buf, []byte("\n")), bytes.HasSuffix(h.buf, []byte("\n\r")):
		h.want = 1
	default:
		h.want = len("\n\n")
	}
}

// Input implements Handshake.
func (h *httpConnect) Input() []byte {
	if h.phase != recvHead {
		return nil
	}
	if cap(h.buf) < len(h.buf)+h.want {
		h.buf = append(make([]byte, 0, 2*cap(h.buf)+h.want), h.buf...)
	}
	return h.buf[len(h.buf) : len(h.buf)+h.want]
}

// Received implements Handshake.
func (h *httpConnect) Received(n int) error {
	h.buf = h.buf[:len(h.buf)+n]
	if h.total += n; h.total > maxHTTPHead {
		return fmt.Errorf("%w: the head of its answer has more than %d bytes", ErrMalformed, maxHTTPHead)
	}
	const start = "HTTP/1."
	if got := h.buf[:min(len(h.buf), len(start))]; !strings.HasPrefix(start, string(got)) {
		return fmt.Errorf("%w: it does not speak HTTP/1", ErrMalformed)
	}
	if bytes.IndexByte(h.buf[:min(len(h.buf), httpStatusLen)], '\n') >= 0 {
		return fmt.Errorf("%w: no HTTP status", ErrMalformed)
	}
	if !bytes.HasSuffix(h.buf, []byte("\n\n")) && !bytes.HasSuffix(h.buf, []byte("\n\r\n")) {
		h.expect()
		return nil
	}
	status, ok := httpStatus(h.buf)
	switch {
	case !ok:
		return fmt.Errorf("%w: no HTTP status", ErrMalformed)
	case status < 200: // an interim answer, RFC 9110 section 15.2
		h.buf = h.buf[:0]
		h.expect()
	case status < 300: // a tunnel, even if there is a Content-Length
		h.phase, h.want = granted, 0
	default:
		return h.refused(status)
	}
	return nil
}

// httpStatus parses a line such as "HTTP/1.1 200 OK".
func httpStatus(head []byte) (status int, ok bool) {
	line, _, _ := bytes.Cut(head, []byte("\n"))
	line = bytes.TrimSuffix(line, []byte("\r"))
	if len(line) < httpStatusLen || line[8] != ' ' || len(line) > httpStatusLen && line[httpStatusLen] != ' ' {
		return 0, false
	}
	for _, c := range line[9:httpStatusLen] {
		if c < '0' || c > '9' {
			return 0, false
		}
		status = status*10 + int(c-'0')
	}
	return status, status >= 100
}

var errNoBasic = errors.New("it wants a login, and takes no Basic user and password")

// refused returns the error for an answer other than success. The manual has this table.
func (h *httpConnect) refused(status int) error {
	switch {
	case status == 401 || status == 407:
		basic, asked := h.offersBasic()
		switch {
		case !h.login:
			return fmt.Errorf("%w: it wants a user and a password (HTTP %d)", ErrMethod, status)
		case asked && !basic:
			return fmt.Errorf("%w: %w (HTTP %d)", ErrMethod, errNoBasic, status)
		}
		return fmt.Errorf("%w (HTTP %d)", ErrCredentials, status)
	case status < 400 || status > 599:
		return fmt.Errorf("%w: HTTP %d in answer to CONNECT", ErrMalformed, status)
	}
	reply := ReplyGeneralFailure
	switch status {
	case 403, 451:
		reply = ReplyNotAllowed
	case 405, 501:
		reply = ReplyCommandNotSupported
	case 404, 504:
		reply = ReplyHostUnreachable
	case 500, 502, 503:
		reply = h.proxyStatus()
	}
	return &refusal{fmt.Sprintf("the HTTP proxy answered %d", status), reply}
}

// fields calls f with each header field of the answer. The name is in lower case.
func (h *httpConnect) fields(f func(name, value string)) {
	for line := range strings.Lines(string(h.buf)) {
		if name, value, ok := strings.Cut(line, ":"); ok {
			f(strings.ToLower(name), strings.TrimSpace(value))
		}
	}
}

// offersBasic reports whether the proxy accepts Basic, and whether it names any authentication scheme at all.
func (h *httpConnect) offersBasic() (basic, asked bool) {
	h.fields(func(name, value string) {
		if name == "proxy-authenticate" || name == "www-authenticate" {
			asked = true
			basic = basic || strings.Contains(strings.ToLower(value), "basic")
		}
	})
	return basic, asked
}

// proxyErrors maps those error types of Proxy-Status (RFC 9209, section 2.3) that tell more than the status code.
var proxyErrors = map[string]Reply{
	"connection_refused": ReplyRefused, "destination_ip_unroutable": ReplyNetUnreachable,
	"destination_ip_prohibited": ReplyNotAllowed, "http_request_denied": ReplyNotAllowed,
	"connection_timeout": ReplyHostUnreachable, "dns_timeout": ReplyHostUnreachable, "dns_error": ReplyHostUnreachable,
	"destination_not_found": ReplyHostUnreachable, "destination_unavailable": ReplyHostUnreachable,
}

// proxyStatus returns the meaning of the Proxy-Status field, or a general failure.
func (h *httpConnect) proxyStatus() Reply {
	reply := ReplyGeneralFailure
	h.fields(func(name, value string) {
		if name != "proxy-status" {
			return
		}
		for _, p := range strings.FieldsFunc(value, func(r rune) bool { return r == ';' || r == ',' || r == ' ' }) {
			if kind, ok := strings.CutPrefix(p, "error="); ok && proxyErrors[kind] != 0 {
				reply = proxyErrors[kind]
			}
		}
	})
	return reply
}

// Done implements Handshake.
func (h *httpConnect) Done() bool { return h.phase == granted }

// Bound implements Handshake. HTTP does not name the endpoint.
func (h *httpConnect) Bound() Addr { return Addr{} }

// Requesting implements Handshake.
func (h *httpConnect) Requesting() bool { return h.phase == sendRequest }

// Requested implements Handshake.
func (h *httpConnect) Requested() bool { return h.phase >= recvHead }

// Answered implements Handshake.
func (h *httpConnect) Answered() bool { return h.total > 0 }

// LoggingIn implements Handshake. The credentials are part of the request.
func (h *httpConnect) LoggingIn() bool { return false }

// Again implements Handshake. It is for BIND, which HTTP does not have.
func (h *httpConnect) Again() {}
