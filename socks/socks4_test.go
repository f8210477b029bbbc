package socks

import (
	"bytes"
	"errors"
	"net/netip"
	"testing"
)

func TestSOCKS4(t *testing.T) {
	request := "\x04\x01\x01\xbb\xcb\x00\x71\x07\x00"
	granted := "\x00\x5a\x04\x38\x0a\x00\x00\x01"
	bound := Addr{IP: netip.MustParseAddr("10.0.0.1"), Port: 1080}
	for _, tt := range []struct {
		name   string
		proto  protocol
		cmd    Command
		login  *login
		dst    Addr
		server string
		said   string
		left   int
		err    error
	}{
		{name: "granted", proto: protoSOCKS4, dst: testDst, server: granted + "SSH-2.0", said: request, left: 7},
		{name: "4a with an address", proto: protoSOCKS4a, dst: testDst, server: granted, said: request},
		{name: "mapped IPv4", proto: protoSOCKS4, dst: Addr{IP: netip.MustParseAddr("::ffff:203.0.113.7"), Port: 443},
			server: granted, said: request},
		{name: "user", proto: protoSOCKS4, login: newLogin("alice", ""), dst: testDst, server: granted,
			said: "\x04\x01\x01\xbb\xcb\x00\x71\x07alice\x00"},
		{name: "user and name", proto: protoSOCKS4a, login: newLogin("al", ""), dst: Addr{Name: "example.org", Port: 80},
			server: granted + "x",
			said:   "\x04\x01\x00\x50\x00\x00\x00\x01al\x00example.org\x00", left: 1},
		{name: "BIND", proto: protoSOCKS4, cmd: CmdBind, dst: testDst, server: granted,
			said: "\x04\x02\x01\xbb\xcb\x00\x71\x07\x00"},
		{name: "failed", proto: protoSOCKS4, dst: testDst, server: "\x00\x5b\x00\x00\x00\x00\x00\x00", said: request,
			err: ReplyGeneralFailure},
		{name: "failed in two bytes", proto: protoSOCKS4, dst: testDst, server: "\x00\x5b", said: request,
			err: ReplyGeneralFailure},
		{name: "no identd", proto: protoSOCKS4, dst: testDst, server: "\x00\x5c\x00\x00\x00\x00\x00\x00", said: request,
			err: ErrCredentials},
		{name: "other user", proto: protoSOCKS4, dst: testDst, server: "\x00\x5d\x00\x00\x00\x00\x00\x00", said: request,
			err: ErrCredentials},
		{name: "code", proto: protoSOCKS4, dst: testDst, server: "\x00\x00", said: request, err: ErrMalformed},
		{name: "version", proto: protoSOCKS4, dst: testDst, server: "\x05", said: request, err: ErrMalformed},
		{name: "half", proto: protoSOCKS4, dst: testDst, server: granted[:7], said: request, err: errEOF},
	} {
		if tt.cmd == 0 {
			tt.cmd = CmdConnect
		}
		for _, step := range []int{1, 3, 1000} {
			h, err := newHandshake(nil, tt.proto, tt.login, tt.cmd, tt.dst)
			if err != nil {
				t.Fatalf("%s: %v", tt.name, err)
			}
			said, left, err := play(t, h, []byte(tt.server), step)
			if !errors.Is(err, tt.err) || string(said) != tt.said {
				t.Errorf("%s, step %d: said %q, %v; want %q, %v", tt.name, step, said, err, tt.said, tt.err)
			}
			if err == nil && (left != tt.left || h.Bound() != bound) {
				t.Errorf("%s, step %d: %d bytes left, want %d; bound %v", tt.name, step, left, tt.left, h.Bound())
			}
		}
	}
}

// What a protocol has no words for is said at once, in a way that a group can use.
func TestCannotExpress(t *testing.T) {
	v6, name := Addr{IP: netip.MustParseAddr("2001:db8::1"), Port: 80}, Addr{Name: "example.org", Port: 80}
	for _, tt := range []struct {
		url   string
		cmd   Command
		dst   Addr
		reply Reply
	}{
		{"socks4://h", CmdConnect, name, ReplyAddrTypeNotSupported},
		{"socks4://h", CmdConnect, v6, ReplyAddrTypeNotSupported},
		{"socks4a://h", CmdConnect, v6, ReplyAddrTypeNotSupported},
		{"socks4a://h", CmdConnect, Addr{Name: "a\x00b", Port: 80}, ReplyAddrTypeNotSupported},
		{"socks4a://h", CmdConnect, Addr{IP: netip.MustParseAddr("0.0.0.7"), Port: 80}, ReplyAddrTypeNotSupported},
		{"socks4://h", CmdAssociate, testDst, ReplyCommandNotSupported},
		{"http://h", CmdAssociate, testDst, ReplyCommandNotSupported},
		{"http://h", CmdBind, testDst, ReplyCommandNotSupported},
		{"http://h", CmdConnect, Addr{Name: "a\r\nX: y", Port: 80}, ReplyAddrTypeNotSupported},
	} {
		s, err := ParseServer(tt.url)
		if err != nil {
			t.Fatal(err)
		}
		_, err = NewHandshake(s, tt.cmd, tt.dst)
		var r Reply
		if !errors.Is(err, ErrCannotExpress) || !errors.As(err, &r) || r != tt.reply {
			t.Errorf("%s, command %d, %v: %v", tt.url, tt.cmd, tt.dst, err)
		}
	}
}

func FuzzSOCKS4(f *testing.F) {
	f.Add([]byte("\x00\x5a\x04\x38\x0a\x00\x00\x01SSH"))
	f.Add([]byte("\x00\x5b"))
	f.Add([]byte("\x00\x5d\x00\x00\x00\x00\x00\x00"))
	f.Add([]byte("HTTP/1.1 400"))
	f.Fuzz(func(t *testing.T, server []byte) {
		fuzzCuts(t, server, reply4Len, func() (Handshake, error) { return newSOCKS4(protoSOCKS4, nil, CmdConnect, testDst) })
	})
}

// fuzzCuts plays what server says cut in several ways, which must not matter. A grant takes at most so many bytes.
func fuzzCuts(t *testing.T, server []byte, most int, start func() (Handshake, error)) {
	var first string
	for i, step := range []int{1, 7, 1 << 20} {
		h, err := start()
		if err != nil {
			t.Fatal(err)
		}
		_, left, err := play(t, h, bytes.Clone(server), step)
		outcome := "granted " + h.Bound().String()
		if err != nil {
			outcome = err.Error()
		} else if taken := len(server) - left; taken > most {
			t.Fatalf("%d bytes were taken", taken)
		} else {
			outcome += string(server[taken:])
		}
		if i == 0 {
			first = outcome
		} else if outcome != first {
			t.Fatalf("cut otherwise: %q and %q", first, outcome)
		}
	}
}
