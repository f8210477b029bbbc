package control

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s: got\n%s\nwant\n%s(go test ./cmd/internal/control -update writes it)", name, got, want)
	}
}

// Times are printed in the local zone.
func init() { time.Local = time.UTC }

var now = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

func at(ago time.Duration) *time.Time { t := now.Add(-ago); return &t }

func sample() Status {
	return Status{
		Version: "v0.2.0", PID: 4711, Mode: ModeUp, State: Ready, Since: *at(26*time.Hour + 11*time.Minute),
		ReadyAt: at(26 * time.Hour),
		Config:  "/etc/viasocks/viasocks.conf", Reloaded: at(5*time.Minute + 3*time.Second),
		Upstreams: []Upstream{
			{Name: "proxy", URL: "socks5://alice:***@10.0.0.1:1080", TCP: "ok", UDP: "down", IPv6: "no", NamesUDP: "yes",
				Granted: 10799, Failed: 17, LatencyMS: 34.2, Addresses: []string{"10.0.0.1:1080 tcp"}},
			{Name: "far", URL: "socks5://[2001:db8::1]:1080", TCP: "down", UDP: "not tried", Failed: 4},
			{Name: "direct", TCP: "ok", UDP: "ok", Granted: 3, LatencyMS: 1.5},
		},
		Rules: []Rule{{"port 25 reject", 12, false}, {"dst 203.0.113.0/24 direct", 0, true}, {"default", 1234567, false}},
		DNS:   []string{"fake", "1.1.1.1:53", "9.9.9.9:53"},
		TCP:   TCP{Now: 42, Pending: 3, Total: 10816, Refused: 17, SecondTries: 1005, SecondOpened: 4},
		UDP: UDP{Now: 5, Total: 321, Reassociated: 2, Refused: 9, GSO: "off",
			GSOReason: "Linux 7.1.4 spoils datagrams with some network cards; Linux 7.1.5 does not"},
		Names: Names{Asked: 2048, Answered: 2040, Failed: 8, Own: 2000, Cached: 21, Shared: 4, Cache: Cache{17, 9411},
			Pool: &Pool{Names: 1200, Size: 130816, Held: 7, Evicted: 1}},
		Sniff: &Sniff{Asked: 1203, Named: 1100, Full: 3},
		Up:    5 << 20, Down: 7 << 30,
		Shards: Shards{Now: 4, HandedOver: 1203},
		Host: Host{
			TUN: "viasocks0", Table: 30323, Mark: "0x76000000/0xff000000", Resolved: true,
			Steered: []string{"everything"}, Kept: []string{"connections from outside"},
			Excluded: []string{"192.168.7.0/24 (connected private network)", "uid 998"},
			Refused: []Counter{
				{"refused_output", "bound to a device", 12, 800},
				{"refused_multicast", "multicast and broadcast", 4000, 0},
			},
		},
		Dropped:  []Counter{{"", "ICMP", 3, 0}},
		Warnings: []string{"an ip rule of somebody else stands before ours: 5000: from all lookup 7\x1b[2J"},
	}
}

func TestWriteStatus(t *testing.T) {
	var b strings.Builder
	if err := WriteStatus(&b, sample(), now); err != nil {
		t.Fatal(err)
	}
	s := sample()
	s.State, s.ConfirmBy, s.Reloaded, s.Warnings = Unconfirmed, at(-41*time.Second), nil, nil
	s.Host.Refused, s.Dropped, s.Shards = nil, nil, Shards{Now: 1}
	s.DNS, s.Names, s.Sniff = s.DNS[1:], Names{Asked: 2048, Answered: 2040, Failed: 8}, nil
	b.WriteString("----\n")
	if err := WriteStatus(&b, s, now); err != nil {
		t.Fatal(err)
	}
	golden(t, "status.txt", b.String())
	if strings.Contains(b.String(), "\x1b") {
		t.Error("an escape reaches the terminal")
	}
}

func TestWriteFlows(t *testing.T) {
	f := Flows{Total: 1203, Flows: []Flow{
		{
			ID:       7,
			Proto:    "tcp",
			Src:      "192.0.2.7:41022",
			Dst:      "203.0.113.9:443",
			Host:     "example.org",
			PID:      4711,
			Exe:      "/usr/bin/ari\x1ba2c",
			Rule:     "default",
			Upstream: "proxy",
			State:    "open",
			Start:    *at(2 * time.Hour),
			Up:       4711,
			Down:     123456789,
		},
		{
			ID:       9,
			Proto:    "udp",
			Src:      "[2001:db8::7]:6881",
			Dst:      "[2001:db8:9::1]:6881",
			Rule:     "dst 2001:db8::/32 via b",
			Upstream: "b",
			State:    "retrying",
			Start:    *at(3 * time.Second),
			Up:       20_000,
		},
		{
			ID:       10,
			Proto:    "tcp",
			Src:      "192.0.2.7:41024",
			Dst:      "203.0.113.10:80",
			Host:     "ev\x1b]0;il",
			Rule:     "default",
			Upstream: "proxy",
			State:    "dialing",
			Start:    *at(-time.Second),
		},
	}}
	var b strings.Builder
	if err := WriteFlows(&b, f, now); err != nil {
		t.Fatal(err)
	}
	if err := WriteFlows(&b, Flows{}, now); err != nil {
		t.Fatal(err)
	}
	golden(t, "flows.txt", b.String())
}

func TestUnits(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Hour: "0s", 499 * time.Millisecond: "0s", 59 * time.Second: "59s", time.Minute: "1m0s",
		3*time.Hour + 4*time.Minute:  "3h4m",
		100*24*time.Hour + time.Hour: "100d1h",
	} {
		if got := span(d); got != want {
			t.Errorf("%v: %s, want %s", d, got, want)
		}
	}
	for n, want := range map[uint64]string{0: "0 B", 9999: "9,999 B", 10240: "10.0 KiB", 5 << 30: "5.0 GiB",
		3 << 50: "3072.0 TiB"} {
		if got := byteCount(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
}

// What a terminal would obey is replaced in text, and escaped in JSON, which stays the same to a program.
func TestPlain(t *testing.T) {
	const evil = "a\x1b[2J\x07\r\n\tb\u009b1m\u202ec\u2028d\U000e0001\x7fe\xffé"
	if got, want := Plain(evil), "a?[2J??  b?1m?c?d??e\ufffdé"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	var b strings.Builder
	if err := WriteJSON(&b, map[string]string{"x": evil}); err != nil {
		t.Fatal(err)
	}
	for _, r := range b.String() {
		if r != '\n' && !strconv.IsPrint(r) {
			t.Errorf("JSON has %q raw: %q", r, b.String())
		}
	}
	var back map[string]string
	if err := json.Unmarshal([]byte(b.String()), &back); err != nil || back["x"] != strings.ToValidUTF8(evil, "\ufffd") {
		t.Errorf("%q, %v", back["x"], err)
	}
}

func TestWriteStatusWaiting(t *testing.T) {
	s := Status{Version: "v1", State: Waiting, Since: now, Waiting: "cannot reach the proxy\x1b[2J", ConfirmBy: at(-time.Minute)}
	var b strings.Builder
	if err := WriteStatus(&b, s, now); err != nil {
		t.Fatal(err)
	}
	const want = "  waiting for the proxy; the host is closed until it can be reached: cannot reach the proxy?[2J\n" +
		"  all changes are undone in 1m0s"
	if !strings.Contains(b.String(), ": waiting, up since") || !strings.Contains(b.String(), want) {
		t.Error(b.String())
	}
}
