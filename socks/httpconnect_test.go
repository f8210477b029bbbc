package socks

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
)

func TestHTTPConnect(t *testing.T) {
	request := "CONNECT 203.0.113.7:443 HTTP/1.1\r\nHost: 203.0.113.7:443\r\n\r\n"
	withLogin := "CONNECT 203.0.113.7:443 HTTP/1.1\r\nHost: 203.0.113.7:443\r\n" +
		"Proxy-Authorization: Basic YWxpY2U6czpjcmV0\r\n\r\n"
	alice := newLogin("alice", "s:cret")
	for _, tt := range []struct {
		name   string
		login  *login
		dst    Addr
		server string
		said   string
		left   int
		err    error
		errHas string
	}{
		{name: "granted", server: "HTTP/1.1 200 Connection established\r\n\r\nSSH-2.0", left: 7},
		{name: "fields", server: "HTTP/1.0 200 OK\r\nContent-Length: 5\r\nVia: x\r\n\r\nhello", left: 5},
		{name: "no reason", server: "HTTP/1.1 200\r\n\r\nx", left: 1},
		{name: "bare line feeds", server: "HTTP/1.1 200 OK\nA: b\n\n\n", left: 1},
		{name: "the target begins with an empty line", server: "HTTP/1.1 200 OK\r\n\r\n\r\n\r\n", left: 4},
		{name: "interim", server: "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\nA: b\r\n\r\n" +
			"HTTP/1.1 204 No Content\r\n\r\nx", left: 1},
		{name: "IPv6", dst: Addr{IP: netip.MustParseAddr("2001:db8::1"), Port: 80}, server: "HTTP/1.1 200 OK\r\n\r\n",
			said: "CONNECT [2001:db8::1]:80 HTTP/1.1\r\nHost: [2001:db8::1]:80\r\n\r\n"},
		{name: "mapped IPv4", dst: Addr{IP: netip.MustParseAddr("::ffff:203.0.113.7"), Port: 443},
			server: "HTTP/1.1 200 OK\r\n\r\n"},
		{name: "name", dst: Addr{Name: "example.org", Port: 80}, server: "HTTP/1.1 200 OK\r\n\r\n",
			said: "CONNECT example.org:80 HTTP/1.1\r\nHost: example.org:80\r\n\r\n"},
		{name: "login", login: alice, server: "HTTP/1.1 200 OK\r\n\r\n", said: withLogin},
		{name: "login wanted", server: "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=x\r\n\r\n",
			err: ErrMethod},
		{name: "login wanted by 401", server: "HTTP/1.1 401 Unauthorized\r\n\r\n", err: ErrMethod},
		{name: "login refused", login: alice, server: "HTTP/1.1 407 No\r\nProxy-Authenticate: Digest\r\n" +
			"proxy-authenticate: basic realm=x\r\n\r\n",
			said: withLogin, err: ErrCredentials},
		{name: "no Basic", login: alice, server: "HTTP/1.1 407 No\r\nProxy-Authenticate: Negotiate\r\n\r\n", said: withLogin,
			err: ErrMethod, errHas: "no Basic"},
		{name: "400", server: "HTTP/1.1 400 Bad Request\r\n\r\n", err: ReplyGeneralFailure},
		{name: "403", server: "HTTP/1.1 403 Forbidden\r\n\r\n<html>", err: ReplyNotAllowed, errHas: "answered 403"},
		{name: "404", server: "HTTP/1.1 404 No such domain\r\n\r\n", err: ReplyHostUnreachable},
		{name: "405", server: "HTTP/1.1 405 Method Not Allowed\r\n\r\n", err: ReplyCommandNotSupported},
		{name: "500", server: "HTTP/1.1 500 Unable to connect\r\n\r\n", err: ReplyGeneralFailure},
		{name: "502", server: "HTTP/1.1 502 Bad Gateway\r\n\r\n", err: ReplyGeneralFailure},
		{name: "503", server: "HTTP/1.1 503 Service Unavailable\r\n\r\n", err: ReplyGeneralFailure},
		{name: "504", server: "HTTP/1.1 504 Gateway Timeout\r\n\r\n", err: ReplyHostUnreachable},
		{name: "Proxy-Status", server: "HTTP/1.1 502 No\r\nProxy-Status: p.example; error=connection_refused; next-hop=x\r\n\r\n",
			err: ReplyRefused},
		{name: "Proxy-Status unknown", server: "HTTP/1.1 502 No\r\nProxy-Status: p; error=whatever\r\n\r\n",
			err: ReplyGeneralFailure},
		{name: "redirect", server: "HTTP/1.1 302 Found\r\nLocation: http://x\r\n\r\n", err: ErrMalformed},
		{name: "600", server: "HTTP/1.1 600 x\r\n\r\n", err: ErrMalformed},
		{name: "no status", server: "HTTP/1.1 2x0 OK\r\n\r\n", err: ErrMalformed},
		{name: "long status", server: "HTTP/1.1 2000 OK\r\n\r\n", err: ErrMalformed},
		{name: "short line", server: "HTTP/1.1\r\n\r\nxxxx\r\n\r\n", err: ErrMalformed},
		{name: "SOCKS", server: "\x05\xff", err: ErrMalformed},
		{name: "HTTP/2", server: "HTTP/2 200\r\n\r\nxxx", err: ErrMalformed},
		{name: "endless head", server: "HTTP/1.1 200 OK\r\n" + strings.Repeat("A: b\r\n", 4000), err: ErrMalformed},
		{name: "endless interim", server: strings.Repeat("HTTP/1.1 100 Continue\r\n\r\n", 2000), err: ErrMalformed},
		{name: "half a head", server: "HTTP/1.1 200 OK\r\n", err: errEOF},
	} {
		if tt.dst == (Addr{}) {
			tt.dst = testDst
		}
		if tt.said == "" {
			tt.said = request
		}
		for _, step := range []int{1, 3, 1000} {
			h, err := newHandshake(nil, protoHTTP, tt.login, CmdConnect, tt.dst)
			if err != nil {
				t.Fatalf("%s: %v", tt.name, err)
			}
			said, left, err := play(t, h, []byte(tt.server), step)
			if !errors.Is(err, tt.err) || string(said) != tt.said {
				t.Errorf("%s, step %d: said %q, %v; want %q, %v", tt.name, step, said, err, tt.said, tt.err)
			}
			if err == nil && left != tt.left {
				t.Errorf("%s, step %d: %d bytes left, want %d", tt.name, step, left, tt.left)
			}
			if err != nil && (!strings.Contains(err.Error(), tt.errHas) || strings.Contains(err.Error(), "s:cret")) {
				t.Errorf("%s: %v", tt.name, err)
			}
		}
	}
}

func FuzzHTTPConnect(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 Connection established\r\n\r\nSSH-2.0"))
	f.Add([]byte("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 200\n\nx"))
	f.Add([]byte("HTTP/1.1 407 No\r\nProxy-Authenticate: Basic\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 502 No\r\nProxy-Status: p; error=connection_refused\r\n\r\n"))
	f.Add([]byte("\x05\xff"))
	f.Fuzz(func(t *testing.T, server []byte) {
		fuzzCuts(t, server, maxHTTPHead, func() (Handshake, error) { return newHTTP(nil, CmdConnect, testDst) })
	})
}
