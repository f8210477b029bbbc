package portmap

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"testing"
	"time"
)

// fakeBackend gives the suggested port after so many calls.
type fakeBackend struct {
	state   State
	maps    []string
	unmaps  []uint16
	outer   netip.AddrPort
	address State
}

func (f *fakeBackend) Map(w Want) (netip.AddrPort, State) {
	f.maps = append(f.maps, "")
	if f.outer.IsValid() {
		return f.outer, f.state
	}
	return netip.AddrPortFrom(netip.MustParseAddr("203.0.113.1"), w.Outer), f.state
}
func (f *fakeBackend) Unmap(_ Proto, app netip.AddrPort) { f.unmaps = append(f.unmaps, app.Port()) }
func (f *fakeBackend) External() (netip.Addr, State) {
	return netip.MustParseAddr("203.0.113.1"), f.address
}

var (
	epoch  = time.Unix(1_000_000, 0)
	client = netip.MustParseAddrPort("198.18.0.1:40000")
)

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Requests and answers of NAT-PMP, by the figures of RFC 6886, section 3.
func TestNATPMP(t *testing.T) {
	at := epoch.Add(5 * time.Second)
	for _, tt := range []struct {
		name, ask, want string
		back            fakeBackend
	}{
		{"address", "0000", "0080000000000005cb007101", fakeBackend{address: Works}},
		{"address, not known yet", "0000", "", fakeBackend{address: Wait}},
		{"address, no proxy", "0000", "008000030000000500000000", fakeBackend{address: Failed}},
		{"TCP", "000200001ae11ae100000e10", "00820000000000051ae11ae100000078", fakeBackend{state: Works}},
		{"TCP, short lifetime", "000200001ae11ae100000010", "00820000000000051ae11ae100000010", fakeBackend{state: Works}},
		{"TCP, another port", "000200001ae11ae100000e10", "00820000000000051ae1ea6000000078",
			fakeBackend{state: Works, outer: netip.MustParseAddrPort("203.0.113.1:60000")}},
		{"TCP, not known yet", "000200001ae11ae100000e10", "", fakeBackend{state: Wait}},
		{"TCP, not allowed", "000200001ae11ae100000e10", "00820002000000051ae1000000000000", fakeBackend{state: Forbidden}},
		{"UDP, not possible", "000100001ae11ae100000e10", "00810004000000051ae1000000000000", fakeBackend{state: Unsupported}},
		{"delete", "000200001ae11ae100000000", "00820000000000051ae1000000000000", fakeBackend{}},
		{"port 0", "0002000000001ae100000e10", "008200020000000500000000" + "00000000", fakeBackend{state: Works}},
		{"unknown opcode", "0007", "0087000500000005", fakeBackend{}},
		{"an answer", "0080000000000005cb007101", "", fakeBackend{address: Works}},
		{"short", "00020000", "", fakeBackend{state: Works}},
		{"one byte", "00", "", fakeBackend{}},
		{"nothing", "", "", fakeBackend{}},
	} {
		s := New(&tt.back, epoch)
		if got := s.Handle(unhex(t, tt.ask), client, at); !bytes.Equal(got, unhex(t, tt.want)) {
			t.Errorf("%s: %x, want %s", tt.name, got, tt.want)
		}
	}
}

func pcpMapRequest(proto byte, port, suggested uint16, life uint32, from netip.Addr, nonce byte, options ...byte) []byte {
	b := []byte{2, 1, 0, 0}
	b = binary.BigEndian.AppendUint32(b, life)
	ip := from.As16()
	b = append(b, ip[:]...)
	b = append(b, bytes.Repeat([]byte{nonce}, 12)...)
	b = append(b, proto, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, port)
	b = binary.BigEndian.AppendUint16(b, suggested)
	b = append(b, make([]byte, 16)...)
	return append(b, options...)
}

// Requests and results of PCP, RFC 6887.
func TestPCP(t *testing.T) {
	from := client.Addr()
	ok := pcpMapRequest(6, 6881, 6881, 3600, from, 7)
	far := fakeBackend{state: Works, outer: netip.MustParseAddrPort("203.0.113.1:60000")}
	for _, tt := range []struct {
		name   string
		ask    []byte
		back   fakeBackend
		result int // -1: no answer
	}{
		{"map", ok, fakeBackend{state: Works}, pcpSuccess},
		{"not known yet", ok, fakeBackend{state: Wait}, -1},
		{"no proxy", ok, fakeBackend{state: Failed}, pcpNetworkFailure},
		{"announce", append([]byte{2, 0, 0, 0, 0, 0, 0, 0}, ok[8:24]...), fakeBackend{}, pcpSuccess},
		{"another address", pcpMapRequest(6, 6881, 0, 60, netip.MustParseAddr("198.18.0.9"), 7), fakeBackend{state: Works},
			pcpAddressMismatch},
		{"version 1", append([]byte{1}, ok[1:]...), fakeBackend{}, pcpUnsuppVersion},
		{"version 9, short", []byte{9, 1}, fakeBackend{}, pcpUnsuppVersion},
		{"PEER", append([]byte{2, 2}, ok[2:]...), fakeBackend{}, pcpUnsuppOpcode},
		{"short", ok[:44], fakeBackend{}, pcpMalformed},
		{"no multiple of 4", append(ok[:60:60], 1), fakeBackend{}, pcpMalformed},
		{"too long", append(ok[:60:60], make([]byte, 1044)...), fakeBackend{}, pcpMalformed},
		{"all protocols", pcpMapRequest(0, 0, 0, 60, from, 7), fakeBackend{state: Works}, pcpUnsuppProtocol},
		{"SCTP", pcpMapRequest(132, 6881, 0, 60, from, 7), fakeBackend{state: Works}, pcpUnsuppProtocol},
		{"THIRD_PARTY",
			pcpMapRequest(6, 6881, 0, 60, from, 7, append([]byte{1, 0, 0, 16}, make([]byte, 16)...)...), fakeBackend{state: Works},
			pcpUnsuppOption},
		{"optional option", pcpMapRequest(6, 6881, 0, 60, from, 7, 200, 0, 0, 1, 5, 0, 0, 0), fakeBackend{state: Works}, pcpSuccess},
		{"option past the end", pcpMapRequest(6, 6881, 0, 60, from, 7, 200, 0, 0, 9), fakeBackend{state: Works}, pcpMalformed},
		{"PREFER_FAILURE", pcpMapRequest(6, 6881, 6881, 60, from, 7, 2, 0, 0, 0), fakeBackend{state: Works}, pcpSuccess},
		{"PREFER_FAILURE, another port", pcpMapRequest(6, 6881, 6881, 60, from, 7, 2, 0, 0, 0), far, pcpCannotProvide},
		{"PREFER_FAILURE twice", pcpMapRequest(6, 6881, 6881, 60, from, 7, 2, 0, 0, 0, 2, 0, 0, 0),
			fakeBackend{state: Works}, pcpMalformed},
		{"delete nothing", pcpMapRequest(6, 6881, 0, 0, from, 7), fakeBackend{}, pcpSuccess},
	} {
		s := New(&tt.back, epoch)
		got := s.Handle(tt.ask, client, epoch.Add(9*time.Second))
		switch {
		case tt.result < 0 && got != nil:
			t.Errorf("%s: %x, want no answer", tt.name, got)
		case tt.result < 0:
		case len(got) < 24 || len(got)%4 != 0 || got[0] != 2 || got[1]&0x80 == 0:
			t.Errorf("%s: %x", tt.name, got)
		case int(got[3]) != tt.result:
			t.Errorf("%s: result %d, want %d", tt.name, got[3], tt.result)
		case binary.BigEndian.Uint32(got[8:]) != 9:
			t.Errorf("%s: epoch %d", tt.name, binary.BigEndian.Uint32(got[8:]))
		}
	}
}

// An answer of PCP names the outer endpoint, and another nonce cannot end the port.
func TestPCPAnswer(t *testing.T) {
	ok := pcpMapRequest(6, 6881, 6881, 3600, client.Addr(), 7)
	far := fakeBackend{state: Works, outer: netip.MustParseAddrPort("203.0.113.1:60000")}
	s := New(&far, epoch)
	got := s.Handle(ok, client, epoch)
	if len(got) != 60 || !bytes.Equal(got[24:42], ok[24:42]) {
		t.Fatalf("%x", got)
	}
	if port := binary.BigEndian.Uint16(got[42:]); port != 60000 {
		t.Errorf("outer port %d", port)
	}
	if ip := netip.AddrFrom16([16]byte(got[44:60])); ip.Unmap() != far.outer.Addr() {
		t.Errorf("outer address %v", ip)
	}
	if got := s.Handle(pcpMapRequest(6, 6881, 6881, 0, client.Addr(), 8), client, epoch); got[3] != pcpNotAuthorized {
		t.Errorf("another nonce ends the mapping: result %d", got[3])
	}
}

// A program that asks for a port for an hour has it longer than it is told, because Transmission asks again only after 20
// minutes. With PCP it ends as told: a program that starts again could not get it back, having another nonce.
func TestKeptLonger(t *testing.T) {
	for name, tt := range map[string]struct {
		ask  []byte
		keep time.Duration
	}{
		"NAT-PMP":            {unhex(t, "000200001ae11ae100000e10"), keepMost},
		"NAT-PMP, 5 minutes": {unhex(t, "000200001ae11ae10000012c"), 5 * time.Minute},
		"PCP":                {pcpMapRequest(6, 6881, 6881, 3600, client.Addr(), 7), MaxLifetime},
	} {
		back := &fakeBackend{state: Works}
		s := New(back, epoch)
		s.Handle(tt.ask, client, epoch)
		s.Expire(epoch.Add(tt.keep - time.Second))
		if len(back.unmaps) != 0 {
			t.Errorf("%s: it has ended before %v", name, tt.keep)
		}
		s.Expire(epoch.Add(tt.keep + time.Second))
		if len(back.unmaps) != 1 {
			t.Errorf("%s: it has not ended after %v", name, tt.keep)
		}
	}
}

// A port ends when it is deleted, when nobody asks again, and with all of its protocol; there is a limit for each program.
func TestLifetimes(t *testing.T) {
	back := &fakeBackend{state: Works}
	s := New(back, epoch)
	ask := func(port uint16, life uint32, at time.Time) uint16 {
		b := binary.BigEndian.AppendUint16([]byte{0, 2, 0, 0}, port)
		b = binary.BigEndian.AppendUint16(b, port)
		return binary.BigEndian.Uint16(s.Handle(binary.BigEndian.AppendUint32(b, life), client, at)[2:])
	}
	ask(1, 60, epoch)
	ask(2, 7200, epoch)
	ask(1, 60, epoch.Add(50*time.Second))
	s.Expire(epoch.Add(70 * time.Second))
	if len(back.unmaps) != 0 {
		t.Errorf("ended too early: %v", back.unmaps)
	}
	s.Expire(epoch.Add(MaxLifetime - time.Second))
	if len(back.unmaps) != 1 || back.unmaps[0] != 1 {
		t.Errorf("ended: %v, want 1", back.unmaps)
	}
	ask(2, 0, epoch)
	ask(3, 60, epoch)
	ask(4, 60, epoch)
	ask(0, 0, epoch)
	if len(back.unmaps) != 4 || len(s.ports) != 0 {
		t.Errorf("ended: %v", back.unmaps)
	}
	for i := range uint16(maxMappings) {
		if r := ask(100+i, 60, epoch); r != pmpSuccess {
			t.Fatalf("port %d: result %d", i, r)
		}
	}
	if r := ask(99, 60, epoch); r != pmpOutOfResources {
		t.Errorf("over the limit: result %d", r)
	}
	if r := ask(100, 3600, epoch); r != pmpSuccess {
		t.Errorf("a renewal at the limit: result %d", r)
	}
	late := epoch.Add(MaxLifetime + time.Second)
	ask(101, 3600, epoch.Add(time.Second))
	for i := range uint16(maxMappings) - 2 {
		ask(102+i, 3600, late)
	}
	ended := len(back.unmaps)
	if r := ask(98, 3600, late); r != pmpSuccess || len(back.unmaps) != ended+1 || back.unmaps[ended] != 100 {
		t.Errorf("over the limit, with a port that nobody has asked for again: result %d, ended %v", r, back.unmaps[ended:])
	}
	if r := ask(97, 3600, late); r != pmpOutOfResources {
		t.Errorf("over the limit, with ports that are young: result %d", r)
	}
	if c := s.Stats(); c.Refused != 2 || c.Mapped < maxMappings {
		t.Errorf("%+v", c)
	}
}

// Nothing that a program sends makes the server panic, answer an answer, answer at length, or keep more than its limits.
func FuzzHandle(f *testing.F) {
	f.Add([]byte{0, 0})
	f.Add([]byte{0, 2, 0, 0, 26, 225, 26, 225, 0, 0, 14, 16})
	f.Add(pcpMapRequest(6, 6881, 6881, 60, client.Addr(), 7, 2, 0, 0, 0))
	f.Fuzz(func(t *testing.T, msg []byte) {
		for _, state := range []State{Works, Wait, Failed, Unsupported, Forbidden, Full} {
			s := New(&fakeBackend{state: state, address: state}, epoch)
			for range 2 {
				got := s.Handle(msg, client, epoch)
				if len(got) > pcpMaxLen {
					t.Fatalf("%d bytes", len(got))
				}
				if got != nil && (got[1]&0x80 == 0 || msg[1]&0x80 != 0) {
					t.Fatalf("%x is answered with %x", msg, got)
				}
			}
			if len(s.ports) > 1 {
				t.Fatalf("%d ports of one request", len(s.ports))
			}
		}
	})
}
