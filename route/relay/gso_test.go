package relay

import (
	"bytes"
	"net"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/flow"
)

// gsoDecideCases are the cases of TestGSODecide.
var gsoDecideCases = []struct {
	release string
	auto    bool
}{
	{"6.18.44", true},
	{"6.18.2+deb", true},
	{"6.19.99-generic", true},
	{"7.0.0-rc3", false},
	{"7.0", false},
	{"7.0-rc1", false},
	{"7.0.14-2-pve", false},
	{"7.0.250", false},
	{"7.1", false},
	{"7.1.0-rc5", false},
	{"7.1.4", false},
	{"7.1.4-arch1-1", false},
	{"7.1.4.1", false},
	{"7.1.5", true},
	{"7.1.5-arch1-1", true},
	{"7.1.14", true},
	{"7.1.40", true},
	{"7.2.0-rc1", true},
	{"7.10.0", true},
	{"8.0.1", true},
	{"70.1.4", true},
	{"4.4.0", true},
	{"5.10.0-9-amd64", true},
	// Not understood: it may be one of them.
	{"", false},
	{"7", false},
	{"linux", false},
	{"v6.18.2", false},
	{"-6.18.2", false},
	{".6.18", false},
	{"6.x", false},
	{"6..18", false},
	{"6 .18", false},
	{"99999999999999999999.1.1", false},
	{"6.99999999999999999999", false},
	{"6.18.99999999999999999999", false},
	{"\u0667.\u0661.\u0664", false}, // digits, but not ASCII ones
}

// TestGSODecide: auto is off on the kernels that spoil runs, whatever a distributor appends to their release.
func TestGSODecide(t *testing.T) {
	for _, c := range gsoDecideCases {
		on, why := GSOAuto.Decide(c.release)
		if on != c.auto {
			t.Errorf("%q: on %v: %s", c.release, on, why)
		}
		if c.auto && !strings.Contains(why, c.release) {
			t.Errorf("%q: the reason does not name it: %s", c.release, why)
		}
		if on, why := GSOOn.Decide(c.release); !on || !strings.Contains(why, "--udp-gso") {
			t.Errorf("%q, on: %v: %s", c.release, on, why)
		}
		if on, why := GSOOff.Decide(c.release); on || !strings.Contains(why, "--udp-gso") {
			t.Errorf("%q, off: %v: %s", c.release, on, why)
		}
	}
	if r := KernelRelease(); r == "" || strings.ContainsRune(r, 0) {
		t.Errorf("this kernel's release is %q", r)
	} else if _, ok := parseRelease(r); !ok {
		t.Errorf("this kernel's release %q is not understood", r)
	}
}

func TestParseGSO(t *testing.T) {
	for _, g := range []GSO{GSOAuto, GSOOn, GSOOff} {
		if got, err := ParseGSO(g.String()); got != g || err != nil {
			t.Errorf("%v: %v, %v", g, got, err)
		}
	}
	for _, s := range []string{"", "AUTO", "yes", "gso(3)"} {
		if g, err := ParseGSO(s); err == nil {
			t.Errorf("%q is %v", s, g)
		}
	}
}

// FuzzRelease: only what begins with two numbers is understood, and what is appended to it after a dash changes nothing.
func FuzzRelease(f *testing.F) {
	for _, s := range []string{"7.0.0-rc3", "7.1.4-arch1-1", "7.1.5", "6.18.2+deb", "", "7.", "7.1.", "7.1.x", "x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		v, ok := parseRelease(s)
		if v[0] < 0 || v[1] < 0 || v[2] < 0 || !ok && v != (version{}) {
			t.Errorf("%q: %v, %v", s, v, ok)
		}
		if again, still := parseRelease(s + "-1.2.3"); again != v || still != ok {
			t.Errorf("%q: %v %v, with something appended %v %v", s, v, ok, again, still)
		}
		if ok && (s[0] < '0' || s[0] > '9' || !strings.Contains(s, ".")) {
			t.Errorf("%q is understood as %v", s, v)
		}
		if on, why := GSOAuto.Decide(s); why == "" || on && !ok {
			t.Errorf("%q: on %v: %q", s, on, why)
		}
	})
}

// TestLinkWithoutGSO: with GSO a run leaves as one message, which a socket with UDP_GRO gets whole; without it, datagram by
// datagram. A link that is open follows the change, and every datagram arrives as it was either way.
func TestLinkWithoutGSO(t *testing.T) {
	l := newLoop(t)
	srv := udpServer(t, "udp4", "127.0.0.1:0")
	raw, err := srv.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_GRO, 1) })
	if err != nil {
		t.Skip("the kernel has no UDP_GRO:", err)
	}
	k := openLink(t, l, udpSocket(t, unix.AF_INET, addrOf(srv)), testCodec{}, func([]flow.Packet) {})
	const count, size = 40, 500
	dst := netip.MustParseAddrPort("192.0.2.1:6881")
	var ps []flow.Packet
	var want []byte
	for i := range count {
		p := bytes.Repeat([]byte{byte(i)}, size)
		ps = append(ps, flow.Packet{Dst: dst, Payload: p})
		want = append(testCodec{}.AppendHeader(want, dst), p...)
	}
	for round, on := range []bool{true, false, true} { // a new loop has it on
		if round > 0 {
			l.SetGSO(on)
		}
		if n, err := k.Send(ps); n != count || err != nil {
			t.Fatalf("GSO %v: sent %d, %v", on, n, err)
		}
		var got []byte
		messages, runs := 0, 0
		for len(got) < len(want) {
			b, isRun := receiveRun(t, srv)
			if isRun {
				runs++
			}
			if !on && len(b) != size+10 {
				t.Errorf("without GSO a message of %d bytes came", len(b))
			}
			got = append(got, b...)
			messages++
		}
		if !bytes.Equal(got, want) {
			t.Errorf("GSO %v: the datagrams came otherwise than they were sent", on)
		}
		if on && (messages != 1 || runs != 1) || !on && (messages != count || runs != 0) {
			t.Errorf("GSO %v: %d messages came, %d of them runs", on, messages, runs)
		}
	}
	if st := k.Stats(); st.Sent != 3*count || st.SentBytes != 3*count*size || st.Unsendable+st.Full+st.TooLarge != 0 {
		t.Errorf("%+v", st)
	}
}

// receiveRun receives a message, and reports whether it is a run of datagrams.
func receiveRun(t *testing.T, u *net.UDPConn) (b []byte, isRun bool) {
	t.Helper()
	buf, oob := make([]byte, 1<<16), make([]byte, 64)
	n, oobn, _, _, err := u.ReadMsgUDP(buf, oob)
	if err != nil {
		t.Fatal(err)
	}
	cs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range cs {
		isRun = isRun || c.Header.Level == unix.IPPROTO_UDP && c.Header.Type == unix.UDP_GRO
	}
	return buf[:n], isRun
}
