package socks

import (
	"bytes"
	"errors"
	"net/netip"
	"strings"
	"testing"
)

var testDst = Addr{IP: netip.MustParseAddr("203.0.113.7"), Port: 443}

// play runs a handshake against the bytes of a server, step bytes at a time. It returns what the client said, and how
// many of the server's bytes it did not take.
func play(t testing.TB, h Handshake, server []byte, step int) (said []byte, left int, err error) {
	for turns := 0; !h.Done(); turns++ {
		if turns > 50000 {
			t.Fatal("the handshake does not end")
		}
		out, in := h.Output(), h.Input()
		if (len(out) > 0) == (len(in) > 0) {
			t.Fatalf("it must be one side's turn: %d to send, %d wanted", len(out), len(in))
		}
		if len(out) > 0 {
			n := min(step, len(out))
			said = append(said, out[:n]...)
			h.Sent(n)
			continue
		}
		n := min(step, copy(in, server))
		if n == 0 {
			return said, 0, errEOF
		}
		clear(in[n:])
		server = server[n:]
		if err := h.Received(n); err != nil {
			return said, len(server), err
		}
	}
	if len(h.Output()) > 0 || len(h.Input()) > 0 {
		t.Fatal("wants more although it is done")
	}
	return said, len(server), nil
}

// name255 is as long as a name, a user and a password may be.
var name255 = strings.Repeat("n", 255)

// testRequest asks for a CONNECT to testDst.
const testRequest = "\x05\x01\x00\x01\xcb\x00\x71\x07\x01\xbb"

// handshakeCases are the cases of TestHandshake.
var handshakeCases = []struct {
	name   string
	login  *login
	dst    Addr
	server string
	said   string
	bound  Addr
	left   int // bytes behind the reply
	err    error
}{
	{name: "granted", dst: testDst, server: "\x05\x00" + "\x05\x00\x00\x01\x0a\x00\x00\x01\x04\x38" + "SSH-2.0",
		said: "\x05\x01\x00" + testRequest, bound: Addr{IP: netip.MustParseAddr("10.0.0.1"), Port: 1080}, left: 7},
	{name: "name and IPv6", dst: Addr{Name: "example.org", Port: 80},
		server: "\x05\x00" + "\x05\x00\x00\x04\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x09\x00\x50" + "x",
		said:   "\x05\x01\x00" + "\x05\x01\x00\x03\x0bexample.org\x00\x50",
		bound:  Addr{IP: netip.MustParseAddr("2001:db8::9"), Port: 80}, left: 1},
	{name: "mapped IPv4 goes as IPv4", dst: Addr{IP: netip.MustParseAddr("::ffff:203.0.113.7"), Port: 443},
		server: "\x05\x00", said: "\x05\x01\x00" + testRequest, err: errEOF},
	{name: "bound to a name", dst: testDst, server: "\x05\x00" + "\x05\x00\x00\x03\xff" + name255 + "\x00\x01" + "x",
		said: "\x05\x01\x00" + testRequest, bound: Addr{Name: name255, Port: 1}, left: 1},
	{name: "bound to a name of one byte", dst: testDst, server: "\x05\x00" + "\x05\x00\x00\x03\x01a\x00\x01" + "xyz",
		said: "\x05\x01\x00" + testRequest, bound: Addr{Name: "a", Port: 1}, left: 3},
	{name: "longest name", dst: Addr{Name: name255, Port: 1}, server: "\x05\x00" + "\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00",
		said: "\x05\x01\x00" + "\x05\x01\x00\x03\xff" + name255 + "\x00\x01", bound: Addr{IP: netip.IPv4Unspecified()}},
	{name: "login", login: newLogin("alice", "secret"), dst: testDst,
		server: "\x05\x02" + "\x01\x00" + "\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00" + "x",
		said:   "\x05\x02\x00\x02" + "\x01\x05alice\x06secret" + testRequest, bound: Addr{IP: netip.IPv4Unspecified()}, left: 1},
	{name: "login not wanted", login: newLogin("alice", "secret"), dst: testDst, server: "\x05\x00",
		said: "\x05\x02\x00\x02" + testRequest, err: errEOF},
	{name: "longest login", login: newLogin(name255, name255), dst: testDst, server: "\x05\x02" + "\x01\x00",
		said: "\x05\x02\x00\x02" + "\x01\xff" + name255 + "\xff" + name255 + testRequest, err: errEOF},
	{name: "login refused", login: newLogin("alice", ""), dst: testDst, server: "\x05\x02" + "\x01\x01",
		said: "\x05\x02\x00\x02" + "\x01\x05alice\x00", err: ErrCredentials},
	{name: "login version", login: newLogin("alice", "s"), dst: testDst, server: "\x05\x02" + "\x05\x00",
		said: "\x05\x02\x00\x02" + "\x01\x05alice\x01s", err: ErrMalformed},
	{name: "no method", dst: testDst, server: "\x05\xff", said: "\x05\x01\x00", err: ErrMethod},
	{
		name:   "no method for a login",
		login:  newLogin("a", "b"),
		dst:    testDst,
		server: "\x05\xff",
		said:   "\x05\x02\x00\x02",
		err:    ErrMethod,
	},
	{name: "login wanted, none offered", dst: testDst, server: "\x05\x02", said: "\x05\x01\x00", err: ErrMethod},
	{
		name:   "refused in two bytes",
		dst:    testDst,
		server: "\x05\x00" + "\x05\x05",
		said:   "\x05\x01\x00" + testRequest,
		err:    ReplyRefused,
	},
	{name: "GSSAPI", dst: testDst, server: "\x05\x01", said: "\x05\x01\x00", err: ErrMalformed},
	{name: "HTTP", dst: testDst, server: "H", said: "\x05\x01\x00", err: ErrMalformed},
	{
		name:   "version of the reply",
		dst:    testDst,
		server: "\x05\x00" + "\x04",
		said:   "\x05\x01\x00" + testRequest,
		err:    ErrMalformed,
	},
	{
		name:   "address type",
		dst:    testDst,
		server: "\x05\x00" + "\x05\x00\x00\x02",
		said:   "\x05\x01\x00" + testRequest,
		err:    ErrMalformed,
	},
	{
		name:   "empty name",
		dst:    testDst,
		server: "\x05\x00" + "\x05\x00\x00\x03\x00",
		said:   "\x05\x01\x00" + testRequest,
		err:    ErrMalformed,
	},
	{
		name:   "refused",
		dst:    testDst,
		server: "\x05\x00" + "\x05\x05\x00\x01\x00",
		said:   "\x05\x01\x00" + testRequest,
		err:    ReplyRefused,
	},
	{
		name:   "refused with a careless rest",
		dst:    testDst,
		server: "\x05\x00" + "\x05\x04\x00\x00\x00",
		said:   "\x05\x01\x00" + testRequest,
		err:    ReplyHostUnreachable,
	},
	{
		name:   "unassigned reply",
		dst:    testDst,
		server: "\x05\x00" + "\x05\xfe\x00\x01\x00",
		said:   "\x05\x01\x00" + testRequest,
		err:    Reply(254),
	},
	{
		name:   "half a reply",
		dst:    testDst,
		server: "\x05\x00" + "\x05\x00\x00\x01\x01\x02",
		said:   "\x05\x01\x00" + testRequest,
		err:    errEOF,
	},
}

func TestHandshake(t *testing.T) {
	tests := handshakeCases
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, step := range []int{1, 2, 3, 1000} {
				h, err := NewHandshake(Server{login: tt.login}, CmdConnect, tt.dst)
				if err != nil {
					t.Fatal(err)
				}
				said, left, err := play(t, h, []byte(tt.server), step)
				if !errors.Is(err, tt.err) {
					t.Fatalf("step %d: error %v, want %v", step, err, tt.err)
				}
				if string(said) != tt.said {
					t.Errorf("step %d: said %q, want %q", step, said, tt.said)
				}
				if err == nil && (left != tt.left || h.Bound() != tt.bound) {
					t.Errorf("step %d: %d bytes left, want %d; bound %v, want %v", step, left, tt.left, h.Bound(), tt.bound)
				}
			}
		})
	}
}

func TestHandshakeTells(t *testing.T) {
	h, _ := NewHandshake(Server{}, CmdConnect, testDst)
	states := ""
	note := func() {
		for _, b := range []bool{h.Requested(), h.Answered(), h.Done()} {
			states += map[bool]string{true: "1", false: "0"}[b]
		}
		states += " "
	}
	h.Sent(3)
	note()
	copy(h.Input(), "\x05\x00")
	h.Received(2)
	h.Sent(9)
	note()
	h.Sent(1)
	note()
	copy(h.Input(), "\x05")
	h.Received(1)
	note()
	copy(h.Input(), "\x00\x00\x01\x00")
	h.Received(4)
	note()
	h.Received(len(h.Input()))
	note()
	if want := "000 000 100 110 110 111 "; states != want {
		t.Errorf("states %q, want %q", states, want)
	}
}

func TestHandshakeRefusesDst(t *testing.T) {
	for _, dst := range []Addr{{Port: 80}, {Name: strings.Repeat("x", 256), Port: 80}} {
		if _, err := NewHandshake(Server{}, CmdConnect, dst); err == nil {
			t.Errorf("%.20v… is taken", dst)
		}
	}
}

// FuzzHandshake: whatever a server says, the client neither panics nor reads past the reply, and the way its bytes are
// cut does not matter.
func FuzzHandshake(f *testing.F) {
	f.Add([]byte("\x05\x00\x05\x00\x00\x01\x0a\x00\x00\x01\x04\x38SSH"), true)
	f.Add([]byte("\x05\x02\x01\x00\x05\x00\x00\x03\x02ab\x00\x01xyz"), true)
	f.Add([]byte("\x05\x00\x05\x00\x00\x04aaaaaaaaaaaaaaaa\x00\x01x"), false)
	f.Add([]byte("\x05\xff"), false)
	f.Add([]byte("\x05\x00\x05\x05\x00\x00\x00"), false)
	f.Add([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"), true)
	f.Fuzz(func(t *testing.T, server []byte, withLogin bool) {
		var s Server
		if withLogin {
			s.login = newLogin("alice", "secret")
		}
		type result struct {
			said []byte
			left int
			err  string
			done bool
		}
		var results []result
		for _, step := range []int{1, 7, 1 << 20} {
			h, err := NewHandshake(s, CmdConnect, testDst)
			if err != nil {
				t.Fatal(err)
			}
			said, left, err := play(t, h, bytes.Clone(server), step)
			r := result{said: said, left: left, done: h.Done()}
			if err != nil {
				r.err, r.left = err.Error(), 0
			} else {
				if taken := len(server) - left; taken < 2+7 || taken > 2+2+262 {
					t.Fatalf("%d bytes were taken", taken)
				}
			}
			results = append(results, r)
		}
		for _, r := range results[1:] {
			if !bytes.Equal(r.said, results[0].said) || r.left != results[0].left || r.done != results[0].done ||
				r.err != results[0].err {
				t.Fatalf("cut otherwise: %+v and %+v", results[0], r)
			}
		}
	})
}
