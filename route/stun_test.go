package route

import (
	"encoding/hex"
	"net/netip"
	"strings"
	"testing"
)

// The answers of RFC 5769, sections 2.2 and 2.3, name these endpoints.
func TestParseStun(t *testing.T) {
	const software = "8022000b7465737420766563746f7220"
	const head4, head6 = "0101003c2112a442b7e7a701bc34d686fa87dfae", "010100482112a442b7e7a701bc34d686fa87dfae"
	const tail = "00080014"
	for _, tt := range []struct{ name, msg, want string }{
		{
			"IPv4",
			head4 + software + "002000080001a147e112a643" + tail +
				"2b91f599fd9e90c38c7489f92af9ba53f06be7d7" + "80280004c07d4c96",
			"192.0.2.1:32853",
		},
		{"IPv6", head6 + software + "002000140002a1470113a9faa5d3f179bc25f4b5bed2b9d9" + tail +
			"a382954e4be67bf11784c97c8292c275bfe3ed41" + "80280004c8fb0b4c", "[2001:db8:1234:5678:11:2233:4455:6677]:32853"},
		{"an old server", "0101000c2112a442b7e7a701bc34d686fa87dfae" + "0001000800018055c0000201", "192.0.2.1:32853"},
		{
			"both", "010100182112a442b7e7a701bc34d686fa87dfae" + "00010008000180550a000001" + "002000080001a147e112a643",
			"192.0.2.1:32853",
		},
		{"a refusal", "011100082112a442b7e7a701bc34d686fa87dfae" + "0009000400000400", "invalid AddrPort"},
		{"no endpoint", "010100002112a442b7e7a701bc34d686fa87dfae", "invalid AddrPort"},
		{"port 0", "0101000c2112a442b7e7a701bc34d686fa87dfae" + "0001000800010000c0000201", "invalid AddrPort"},
		{"a wrong length", "0101000d2112a442b7e7a701bc34d686fa87dfae" + "0001000800018055c0000201", "invalid AddrPort"},
		{"past the end", "0101000c2112a442b7e7a701bc34d686fa87dfae" + "0001000900018055c0000201", "invalid AddrPort"},
		{"short", "0101", "invalid AddrPort"},
	} {
		msg, err := hex.DecodeString(tt.msg)
		if err != nil {
			t.Fatal(err)
		}
		if got := parseStun(msg); got.String() != tt.want {
			t.Errorf("%s: %v, want %s", tt.name, got, tt.want)
		}
	}
}

// An answer must have the ID of the request.
func TestStunID(t *testing.T) {
	a, b := newStunID(), newStunID()
	msg := a.request()
	if len(msg) != stunHeader || a.answers(msg) {
		t.Errorf("the request %x answers itself", msg)
	}
	msg[0] = stunAnswer >> 8
	if msg[1] = stunAnswer & 0xff; !a.answers(msg) || b.answers(msg) || a.answers(msg[:19]) {
		t.Error("an answer is not told from others")
	}
}

// Nothing that is received makes the parser panic or yields an endpoint that is none.
func FuzzStun(f *testing.F) {
	for _, s := range []string{"0101000c2112a442b7e7a701bc34d686fa87dfae0001000800018055c0000201", strings.Repeat("00", 20)} {
		b, _ := hex.DecodeString(s)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, msg []byte) {
		if at := parseStun(msg); at != (netip.AddrPort{}) && (!at.IsValid() || at.Port() == 0) {
			t.Errorf("%x: %v", msg, at)
		}
	})
}
