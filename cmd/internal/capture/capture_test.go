package capture

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/stack/testkit"
)

// packet is an IP packet with a UDP or TCP header as far as ports, and n bytes more.
func packet(proto byte, src, dst string, n int) []byte {
	s, d := netip.MustParseAddrPort(src), netip.MustParseAddrPort(dst)
	var b []byte
	if s.Addr().Is4() {
		b = make([]byte, ip4Len)
		b[0], b[8], b[9] = 0x45, 64, proto
		copy(b[12:], s.Addr().AsSlice())
		copy(b[16:], d.Addr().AsSlice())
	} else {
		b = make([]byte, ip6Len)
		b[0], b[6], b[7] = 0x60, proto, 64
		copy(b[8:], s.Addr().AsSlice())
		copy(b[24:], d.Addr().AsSlice())
	}
	b = binary.BigEndian.AppendUint16(b, s.Port())
	b = binary.BigEndian.AppendUint16(b, d.Port())
	b = binary.BigEndian.AppendUint16(b, uint16(8+n))
	b = append(b, make([]byte, 2+n)...)
	if s.Addr().Is4() {
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	} else {
		binary.BigEndian.PutUint16(b[4:], uint16(len(b)-ip6Len))
	}
	return b
}

// icmp quotes a packet in an ICMP error.
func icmp(quoted []byte) []byte {
	b := make([]byte, ip4Len+icmpLen)
	b[0], b[9] = 0x45, protoICMP
	copy(b[12:], netip.MustParseAddr("198.18.0.2").AsSlice())
	b[ip4Len] = 3
	return append(b, quoted...)
}

func TestTuple(t *testing.T) {
	for name, tt := range map[string]struct {
		b     []byte
		toApp bool
		want  string
	}{
		"TCP":              {packet(protoTCP, "10.0.0.1:5", "203.0.113.9:80", 10), false, "tcp 10.0.0.1:5 203.0.113.9:80"},
		"TCP back":         {packet(protoTCP, "203.0.113.9:80", "10.0.0.1:5", 10), true, "tcp 10.0.0.1:5 203.0.113.9:80"},
		"UDP6":             {packet(protoUDP, "[fd00::1]:5", "[2001:db8::9]:53", 10), false, "udp [fd00::1]:5 [2001:db8::9]:53"},
		"ICMP":             {icmp(packet(protoTCP, "10.0.0.1:5", "203.0.113.9:80", 0)), true, "tcp 10.0.0.1:5 203.0.113.9:80"},
		"ICMP in ICMP":     {icmp(icmp(packet(protoTCP, "10.0.0.1:5", "203.0.113.9:80", 0))), true, ""},
		"ICMP of nothing":  {icmp(nil), true, ""},
		"empty":            {nil, false, ""},
		"short":            {packet(protoTCP, "10.0.0.1:5", "203.0.113.9:80", 0)[:22], false, ""},
		"another version":  {[]byte(strings.Repeat("\x55", 40)), false, ""},
		"header too long":  {append([]byte{0x4f}, make([]byte, 30)...), false, ""},
		"header too short": {append([]byte{0x41}, make([]byte, 30)...), false, ""},
	} {
		got, ok := tupleOf(tt.b, tt.toApp)
		text := ""
		if ok {
			text = fmt.Sprint(got.proto, " ", got.src, " ", got.dst)
		}
		if text != tt.want {
			t.Errorf("%s: %q, want %q", name, text, tt.want)
		}
	}
	late := packet(protoUDP, "10.0.0.1:5", "203.0.113.9:80", 10)
	late[7] = 1 // a fragment that is not the first has no ports
	if _, ok := tupleOf(late, false); ok {
		t.Error("a later fragment has ports")
	}
}

func FuzzTuple(f *testing.F) {
	f.Add(packet(protoTCP, "10.0.0.1:5", "203.0.113.9:80", 10), true)
	f.Add(icmp(packet(protoUDP, "10.0.0.1:5", "203.0.113.9:80", 0)), false)
	f.Fuzz(func(t *testing.T, b []byte, toApp bool) { tupleOf(b, toApp) })
}

func TestDestination(t *testing.T) {
	at := netip.MustParseAddrPort("203.0.113.9:443")
	for text, want := range map[string]bool{
		"": true, "203.0.113.9": true, "203.0.113.8": false, "203.0.113.0/24": true, "203.0.113.9/24": true,
		"198.51.100.0/24": false,
		"203.0.113.9:443": true, "203.0.113.9:80": false, ":443": true, ":80": false, "2001:db8::/32": false,
		"Example.com": true, "www.example.com.": true, "example.com:443": true, "example.com:80": false, "xample.com": false,
		"mail.www.example.com": false,
	} {
		d, err := parseDestination(text)
		if err != nil || d.matches(at, "www.example.com") != want {
			t.Errorf("%q: %v, %v", text, !want, err)
		}
	}
	for _, bad := range []string{":", ":0", ":http", "a b", "1.2.3.4/33", "a:b:c"} {
		if d, err := parseDestination(bad); err == nil {
			t.Errorf("%q is %+v", bad, d)
		}
	}
}

// clock is a time that the test moves.
type clock struct{ at time.Time }

func (c *clock) now() time.Time { return c.at }

func newSession(t *testing.T, f Filter) (*Recording, *clock) {
	t.Helper()
	s, err := New(f)
	if err != nil {
		t.Fatal(err)
	}
	c := &clock{time.Unix(1_700_000_000, 123456789)}
	s.now = c.now
	return s, c
}

func event(id uint64, proto, src, dst, state string) control.Event {
	return control.Event{Flow: &control.Flow{
		ID: id, Proto: proto, Src: src, Dst: dst, State: state, Upstream: "proxy", Rule: "default", Host: "www.example.com",
		PID: 77, Exe: "/bin/curl",
	}}
}

const (
	app, web = "10.0.0.1:5000", "203.0.113.9:80"
	peer     = "198.51.100.7:6881"
)

// captured runs a session whose packets and events have all come, and returns what it wrote.
func captured(t *testing.T, s *Recording) []byte {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	var out bytes.Buffer
	if err := s.Run(ctx, &out, "viasocks test", "viasocks0"); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// tshark prints fields of each packet, separated by tabs.
func tshark(t *testing.T, file []byte, fields ...string) (lines []string) {
	t.Helper()
	program, err := exec.LookPath("tshark")
	if err != nil {
		t.Skip("no tshark (Debian package tshark): the file was not read by it")
	}
	path := filepath.Join(t.TempDir(), "c.pcapng")
	if err := os.WriteFile(path, file, 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"-r", path, "-T", "fields"}
	for _, f := range fields {
		args = append(args, "-e", f)
	}
	var stderr bytes.Buffer
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("tshark: %v\n%s", err, &stderr)
	}
	if text := strings.TrimRight(string(out), "\n"); text != "" {
		lines = strings.Split(text, "\n")
	}
	return lines
}

func TestSession(t *testing.T) {
	testkit.CheckLeaks(t)
	s, c := newSession(t, Filter{})
	s.Know([]control.Event{event(7, "tcp", app, web, "open"), event(8, "udp", app, peer, "open")})
	s.Saw([][]byte{packet(protoTCP, app, web, 100)}, false)
	c.at = c.at.Add(time.Second)
	whole := packet(protoTCP, web, app, 1000)
	s.Saw([][]byte{whole[:20], whole[20:50], whole[50:]}, true)
	s.Saw([][]byte{packet(protoUDP, app, peer, 30)}, false)
	s.Saw([][]byte{packet(protoUDP, "198.51.100.8:1", app, 31)}, true) // of the same mapping
	s.Saw([][]byte{packet(protoUDP, "10.0.0.1:9", "192.0.2.1:53", 5)}, false)
	file := captured(t, s)
	got := tshark(t, file, "frame.time_epoch", "frame.len", "ip.src", "ip.dst", "frame.interface_name",
		"frame.packet_flags_direction", "frame.comment")
	about := "flow 7: tcp to www.example.com (203.0.113.9:80), program /bin/curl (process 77), upstream proxy, rule default, open"
	mapping := "flow 8: udp to www.example.com (198.51.100.7:6881), program /bin/curl (process 77), upstream proxy, " +
		"rule default, open"
	want := []string{
		"1700000000.123456789 128 10.0.0.1 203.0.113.9 viasocks0 0x00000002 " + about,
		"1700000001.123456789 1028 203.0.113.9 10.0.0.1 viasocks0 0x00000001 ",
		"1700000001.123456789 58 10.0.0.1 198.51.100.7 viasocks0 0x00000002 " + mapping,
		"1700000001.123456789 59 198.51.100.8 10.0.0.1 viasocks0 0x00000001 ",
		"1700000001.123456789 33 10.0.0.1 192.0.2.1 viasocks0 0x00000002 ",
	}
	if len(got) != len(want) {
		t.Fatalf("got %d packets:\n%s", len(got), strings.Join(got, "\n"))
	}
	for i := range want {
		if line := strings.ReplaceAll(got[i], "\t", " "); line != want[i] {
			t.Errorf("packet %d:\ngot  %s\nwant %s", i, line, want[i])
		}
	}
	s.Saw([][]byte{whole}, true) // after the end
	if s.bytes != 0 || s.length != 0 || len(s.queue) > 0 {
		t.Errorf("kept: %d bytes of %d packets", s.bytes, s.length)
	}
}

// TestOutcome: the end of a flow stands beside its last packet, or at the end of the file.
func TestOutcome(t *testing.T) {
	s, _ := newSession(t, Filter{})
	over := event(7, "tcp", app, web, "refused")
	over.Error = "the SOCKS server answered 5 (connection refused)"
	s.Saw([][]byte{packet(protoTCP, app, web, 0)}, false)
	s.Saw([][]byte{icmp(packet(protoTCP, app, web, 0))}, true)
	s.Know([]control.Event{event(7, "tcp", app, web, "dialing"), over})
	got := tshark(t, captured(t, s), "frame.comment")
	const want = "upstream proxy, rule default, refused, 0 bytes up, 0 down: the SOCKS server answered 5 (connection refused)"
	if len(got) == 0 || !strings.HasSuffix(got[0], want) {
		t.Errorf("got %q", got)
	}

	s, _ = newSession(t, Filter{})
	s.Know([]control.Event{event(7, "tcp", app, web, "dialing")})
	s.Saw([][]byte{packet(protoTCP, app, web, 0)}, false)
	p := s.take(true)[0]
	if comment, ok := s.judge(&p); !ok || !strings.HasSuffix(comment, "rule default, dialing") {
		t.Errorf("before the end: %q", comment)
	}
	over.State, over.Error = "silent", ""
	s.Know([]control.Event{over})
	if file := captured(t, s); !bytes.Contains(file, []byte("rule default, silent, 0 bytes up, 0 down")) {
		t.Errorf("the end of the file has no word of it: %q", file)
	}
}

func TestFilters(t *testing.T) {
	for name, tt := range map[string]struct {
		f    Filter
		want int
	}{
		"all":              {Filter{}, 6},
		"flow":             {Filter{Flow: 7}, 2},
		"another flow":     {Filter{Flow: 9}, 0},
		"program":          {Filter{Program: "curl"}, 2},
		"program by path":  {Filter{Program: "/bin/curl"}, 2},
		"program by id":    {Filter{Program: "78"}, 3},
		"another program":  {Filter{Program: "cur"}, 0},
		"network":          {Filter{Destination: "198.51.100.0/24"}, 3},
		"port":             {Filter{Destination: ":80"}, 2},
		"name":             {Filter{Destination: "example.com"}, 2},
		"name and program": {Filter{Destination: "example.com", Program: "78"}, 0},
		"count":            {Filter{Count: 4}, 4},
		"bytes":            {Filter{Bytes: 300}, 2},
	} {
		s, _ := newSession(t, tt.f)
		other := event(8, "udp", app, peer, "open")
		other.PID, other.Exe, other.Host = 78, "/bin/aria2c", ""
		s.Know([]control.Event{event(7, "tcp", app, web, "open"), other, {Event: control.EventLost, Lost: 3}})
		s.Saw([][]byte{packet(protoTCP, app, web, 100)}, false)
		s.Saw([][]byte{packet(protoTCP, web, app, 100)}, true)
		for range 2 {
			s.Saw([][]byte{packet(protoUDP, app, peer, 100)}, false)
		}
		s.Saw([][]byte{packet(protoUDP, "198.51.100.8:1", app, 100)}, true)
		s.Saw([][]byte{{0x60}}, false) // of nobody
		captured(t, s)
		if s.written != uint64(tt.want) {
			t.Errorf("%s: %d packets, want %d", name, s.written, tt.want)
		}
	}
	for _, f := range []Filter{{Count: -1}, {Bytes: -1}, {Time: -1}, {Time: 25 * time.Hour}, {Destination: "a b"},
		{Program: strings.Repeat("a", 300)}} {
		if _, err := New(f); err == nil {
			t.Errorf("%+v is taken", f)
		}
	}
}

// slow is a reader that takes nothing before it may.
type slow struct {
	bytes.Buffer
	may chan struct{}
}

func (w *slow) Write(b []byte) (int, error) {
	<-w.may
	return w.Buffer.Write(b)
}

// TestSlowReader: the data plane does not wait for a reader that does not read; what has no room is dropped and counted.
func TestSlowReader(t *testing.T) {
	testkit.CheckLeaks(t)
	s, err := New(Filter{Bytes: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	w := &slow{may: make(chan struct{})}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error)
	go func() { ran <- s.Run(ctx, w, "viasocks", "viasocks0") }()
	big := packet(protoUDP, app, peer, 60_000)
	const sent = 2 * queueBytes / 60_000
	for range sent {
		s.Saw([][]byte{big}, false)
	}
	s.mu.Lock()
	lost, held := s.lost, s.bytes
	s.mu.Unlock()
	if lost < sent/3 || held > queueBytes {
		t.Errorf("%d of %d were dropped, %d bytes are held", lost, sent, held)
	}
	close(w.may)
	cancel()
	if err := <-ran; err != nil {
		t.Fatal(err)
	}
	if s.dropped+s.written != sent {
		t.Errorf("%d were written and %d counted as dropped, of %d", s.written, s.dropped, sent)
	}
	if got := tshark(t, w.Bytes(), "frame.len"); len(got) != int(s.written) {
		t.Errorf("tshark sees %d packets of %d", len(got), s.written)
	}
}

// TestSmallFrames: packets without a byte cannot fill the memory either.
func TestSmallFrames(t *testing.T) {
	s, _ := newSession(t, Filter{})
	for range queueLen + 10 {
		s.Saw(nil, false)
	}
	if s.length != queueLen || s.lost != 10 {
		t.Errorf("%d are held, %d were dropped", s.length, s.lost)
	}
	many := make([]control.Event, 0, 2*maxFlows)
	for i := range uint64(2 * maxFlows) {
		many = append(many, event(i+1, "tcp", fmt.Sprintf("10.0.%d.%d:5", i>>8&0xff, i&0xff),
			fmt.Sprintf("203.0.113.%d:80", i>>16), "open"))
	}
	s.Know(many)
	if len(s.flows) > maxFlows {
		t.Errorf("%d flows are remembered", len(s.flows))
	}
}

var errGone = errors.New("gone")

type broken struct{}

func (broken) Write([]byte) (int, error) { return 0, errGone }

func TestReaderGone(t *testing.T) {
	s, _ := newSession(t, Filter{})
	if err := s.Run(context.Background(), broken{}, "viasocks", "viasocks0"); !errors.Is(err, errGone) {
		t.Errorf("got %v", err)
	}
}
