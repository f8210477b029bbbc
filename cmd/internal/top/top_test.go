package top

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"

	"github.com/viasocks/viasocks/cmd/internal/control"
)

var update = flag.Bool("update", false, "write the golden views")

var start = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// sample is what viasocks says so many seconds after start.
func sample(seconds int) snapshot {
	now := start.Add(time.Duration(seconds) * time.Second)
	n, flows := uint64(seconds), sampleFlows(uint64(seconds))
	s := snapshot{at: now, flows: control.Flows{Total: len(flows), Flows: flows}}
	s.status = control.Status{
		PID: 4711, Mode: control.ModeUp, State: control.Ready, Since: start.Add(-50 * time.Hour),
		Upstreams: []control.Upstream{
			{Name: "proxy", URL: "socks5://10.0.0.1:1080", TCP: "ok", UDP: "ok", LatencyMS: 34.2, Granted: 900},
			{Name: "seedbox", URL: "2 servers", TCP: "ok", UDP: "down", LatencyMS: 4.21, Failed: 17,
				Servers: []control.UpstreamServer{
					{URL: "socks5://seed1.example.net:1080", State: "ok"},
					{URL: "socks5://seed2.example.net:1080", State: "down", Why: "connection \x1b[5mrefused"},
				}},
			{Name: "direct", TCP: "ok", UDP: "ok", LatencyMS: 1.5},
		},
		TCP: control.TCP{Now: 5, Pending: 1, Total: 10816, Refused: 17}, UDP: control.UDP{Now: 1},
		Names: control.Names{Asked: 123456, Failed: 8}, Warnings: []string{"this host ran out of \x1b[31mports", "another"},
		Up: 30_000 * n * n, Down: 7_700_000 * n,
	}
	return s
}

// sampleFlows are the flows n seconds after start.
func sampleFlows(n uint64) []control.Flow {
	flow := func(id uint64, proto, exe, host, dst, via, state string, ago time.Duration, up, down uint64) control.Flow {
		f := control.Flow{
			ID: id, Proto: proto, Src: fmt.Sprintf("198.18.0.1:%d", 40000+id), Dst: dst, Host: host, Upstream: via, State: state,
			Start: start.Add(-ago), Up: up * n, Down: down * n, Rule: "default",
		}
		if exe != "" {
			f.Exe, f.PID = exe, 4000+len(exe)
		}
		return f
	}
	return []control.Flow{
		flow(
			1,
			"tcp",
			"/usr/bin/aria2c",
			"debian.mirror.example.org",
			"198.18.1.2:443",
			"proxy",
			"open",
			2*time.Hour,
			9000,
			6_400_000,
		),
		flow(
			2,
			"tcp",
			"/usr/lib/firefox/firefox",
			"video-edge-14.streaming.some-very-long-name.example.co.uk",
			"198.18.1.3:443",
			"proxy",
			"open",
			5*time.Minute,
			4000,
			1_300_000,
		),
		flow(3, "udp", "/usr/bin/aria2c", "", "198.51.100.40:6881", "seedbox", "retrying", 3*24*time.Hour, 9000, 0),
		flow(4, "tcp", "/usr/bin/ssh", "bastion.example.org", "198.18.1.1:22", "direct", "open", 26*time.Hour, 300, 900),
		flow(5, "tcp", "", "", "[2001:db8:17::42]:6881", "seedbox", "dialing", 0, 0, 0),
		flow(
			6,
			"tcp",
			"/opt/ev\x1b[31mil\x1b]0;title\a",
			"na\x1b[2Jme\u202e.exa\u0301\u0301\u0301mple",
			"203.0.113.9:80",
			"proxy",
			"open",
			time.Second,
			7,
			7,
		),
	}
}

// shown is a model that has seen some seconds.
func shown(width, height int) *model {
	m := &model{}
	for i := range 30 {
		m.take(answer{snapshot: sample(i)})
	}
	m.Update(tea.WindowSizeMsg{Width: width, Height: height})
	return m
}

// screen is the view without its colours. It fails the test if the view does not fit or has something that a terminal obeys.
func screen(t *testing.T, m *model) string {
	t.Helper()
	text := m.View().Content
	plain := ansi.Strip(text)
	lines := strings.Split(plain, "\n")
	if len(lines) != m.height {
		t.Errorf("%d lines in a terminal of %d", len(lines), m.height)
	}
	for _, l := range lines {
		if w := ansi.StringWidth(l); w > m.width {
			t.Errorf("%d cells in a terminal of %d: %q", w, m.width, l)
		}
	}
	for i, r := range text {
		if r == '\x1b' && !strings.HasPrefix(text[i:], "\x1b[") || r < ' ' && r != '\n' && r != '\x1b' || r == 0x7f ||
			r >= 0x80 && r < 0xa0 ||
			r == 0x202e {
			t.Errorf("a terminal would obey %q", text[i:min(len(text), i+10)])
		}
		if strings.HasPrefix(text[i:], "\x1b[") {
			end := strings.IndexFunc(text[i+2:], func(r rune) bool { return (r < '0' || r > '9') && r != ';' })
			if end < 0 || text[i+2+end] != 'm' {
				t.Errorf("this is no colour: %q", text[i:min(len(text), i+10)])
			}
		}
	}
	for i, l := range lines {
		lines[i] = strings.TrimRight(l, " ")
	}
	return strings.Join(lines, "\n") + "\n"
}

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
		t.Errorf("%s: got\n%s\nwant\n%s(go test ./cmd/internal/top -update writes it)", name, got, want)
	}
}

func press(m *model, keys ...string) tea.Cmd {
	var cmd tea.Cmd
	for _, k := range keys {
		var msg tea.KeyPressMsg
		switch k {
		case "enter":
			msg = tea.KeyPressMsg{Code: tea.KeyEnter}
		case "esc":
			msg = tea.KeyPressMsg{Code: tea.KeyEscape}
		case "backspace":
			msg = tea.KeyPressMsg{Code: tea.KeyBackspace}
		case "down":
			msg = tea.KeyPressMsg{Code: tea.KeyDown}
		case "end":
			msg = tea.KeyPressMsg{Code: tea.KeyEnd}
		case "ctrl+c":
			msg = tea.KeyPressMsg{Code: 'c', Mod: tea.ModCtrl}
		default:
			msg = tea.KeyPressMsg{Code: []rune(k)[0], Text: k}
		}
		_, cmd = m.Update(msg)
	}
	return cmd
}

func TestViews(t *testing.T) {
	for _, size := range [][2]int{{80, 24}, {160, 50}} {
		m := shown(size[0], size[1])
		name := fmt.Sprintf("%dx%d", size[0], size[1])
		golden(t, name+".txt", screen(t, m))
		press(m, "?")
		golden(t, name+"_help.txt", screen(t, m))
	}
}

// Every size is drawn, down to nothing.
func TestSizes(t *testing.T) {
	for width := range 200 {
		for _, height := range []int{0, 1, 2, minHeight - 1, minHeight, 13, 24, 60} {
			m := shown(width, height)
			text := m.View().Content
			if width < minWidth || height < minHeight {
				if strings.Contains(text, "\n") || ansi.StringWidth(text) > width {
					t.Errorf("%dx%d: %q", width, height, text)
				}
				continue
			}
			screen(t, m)
		}
	}
}

func TestSortAndFilter(t *testing.T) {
	m := shown(80, 24)
	ids := func() (all []uint64) {
		for _, r := range m.chosen() {
			all = append(all, r.ID)
		}
		return all
	}
	want := func(what, ids2 string) {
		t.Helper()
		if got := fmt.Sprint(ids()); got != ids2 {
			t.Errorf("%s: %s, want %s", what, got, ids2)
		}
	}
	want("rate", "[1 2 3 4 6 5]")
	press(m, "r")
	want("reversed", "[5 6 4 3 2 1]")
	press(m, "r", "s")
	want("total", "[1 2 3 4 6 5]")
	press(m, "s")
	want("age", "[5 6 2 1 4 3]")
	press(m, "s")
	want("program", "[5 1 3 6 2 4]")
	press(m, "s")
	want("destination", "[3 5 4 1 6 2]")
	press(m, "s")
	want("upstream", "[4 1 2 6 3 5]")
	press(m, "s")
	want("state", "[5 1 2 4 6 3]")
	press(m, "s")
	if m.sort != byRate {
		t.Error(m.sort)
	}
	press(m, "S")
	if m.sort != byState {
		t.Error(m.sort)
	}
	press(m, "s", "/", "A", "r", "i", "a", " ", "u", "d", "x", "backspace", "p", "enter")
	want("filter", "[3]")
	if !strings.Contains(screen(t, m), "filter: Aria udp") || !strings.Contains(screen(t, m), "1 of 6 flows") {
		t.Error(screen(t, m))
	}
	press(m, "/", "z")
	if got := screen(t, m); !strings.Contains(got, "no flow matches the filter") {
		t.Error(got)
	}
	m.Update(tea.PasteMsg{Content: "\x1b[31m" + strings.Repeat("x", 5000)})
	if n := len(m.filter); n > maxFilter || strings.ContainsRune(m.filter, '\x1b') {
		t.Errorf("a filter of %d: %.20q", n, m.filter)
	}
	screen(t, m)
	press(m, "esc")
	if m.filter != "" || m.typing {
		t.Errorf("%+v", m.filter)
	}
}

// The list moves no further than its ends.
func TestScroll(t *testing.T) {
	m := shown(80, 18)
	press(m, "down", "down")
	first := screen(t, m)
	if m.offset == 0 || strings.Contains(first, "debian") {
		t.Errorf("it does not move: %d\n%s", m.offset, first)
	}
	press(m, "end", "down", "down")
	if screen(t, m); m.offset >= len(m.rows) || m.offset == 0 {
		t.Error(m.offset)
	}
	press(m, "g", "k")
	if screen(t, m); m.offset != 0 {
		t.Error(m.offset)
	}
}

// What is paused stays; viasocks that goes is named, and the view goes on when it is back.
func TestPauseAndGone(t *testing.T) {
	m := shown(80, 24)
	press(m, "p")
	before := m.now
	m.take(answer{snapshot: sample(31)})
	if m.now != before || !strings.Contains(screen(t, m), "paused") {
		t.Error(screen(t, m))
	}
	press(m, "p")
	m.take(answer{snapshot: sample(32)})
	if m.now == before {
		t.Error("still paused")
	}
	m.take(answer{err: errors.New("cannot ask viasocks: \x1b[2Jit is not up")})
	if got := screen(t, m); !strings.Contains(got, "gone") || !strings.Contains(got, "cannot ask viasocks: ?[2Jit is not up") ||
		!strings.Contains(got, "debian") {
		t.Error(got)
	}
	other := sample(40)
	other.status.PID = 5
	m.take(answer{snapshot: other})
	if got := screen(t, m); strings.Contains(got, "gone") || !strings.Contains(got, "process 5") || len(m.down) != 0 {
		t.Errorf("%d\n%s", len(m.down), got)
	}
	for _, key := range []string{"q", "ctrl+c"} {
		if cmd := press(m, key); cmd == nil || cmd() != (tea.QuitMsg{}) {
			t.Errorf("%s does not quit", key)
		}
	}
	press(m, "?")
	if cmd := press(m, "q"); cmd == nil {
		t.Error("q in the help does not quit")
	}
}

func TestRates(t *testing.T) {
	var tr traffic
	tr.add(sample(0))
	if len(tr.down) != 0 || tr.rows[0].downRate != 0 {
		t.Error("one snapshot has no rate")
	}
	tr.add(sample(2))
	if got := tr.rows[0].downRate; got != 6_400_000 {
		t.Error(got)
	}
	if u := tr.upstreams[1]; u.flows != 2 || u.upRate != 9000 || u.downRate != 0 {
		t.Errorf("%+v", u)
	}
	back := sample(3)
	back.flows.Flows[0].Down = 5 // another flow with its number
	if tr.add(back); tr.rows[0].downRate != 0 {
		t.Error("a counter that went back has a rate")
	}
	for i := range 2 * history {
		tr.add(sample(4 + i))
	}
	if len(tr.up) != history {
		t.Errorf("%d rates are kept", len(tr.up))
	}
}

func TestFormats(t *testing.T) {
	for n, want := range map[float64]string{
		0: "0", 0.4: "0", 999: "999 B", 1000: "1.0 kB", 9949: "9.9 kB", 9960: "10 kB", 999_499: "999 kB", 999_600: "1.0 MB",
		5e9: "5.0 GB", 7e15: "7000 TB",
	} {
		if got := size(n); got != want {
			t.Errorf("%v: %s, want %s", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 59 * time.Second: "59s", 5*time.Minute + 3*time.Second: "5m03", 26 * time.Hour: "1d",
		2*time.Hour + 7*time.Minute: "2h07",
	} {
		if got := age(d); got != want {
			t.Errorf("%v: %s, want %s", d, got, want)
		}
	}
	for s, want := range map[string]string{"short": "short     ", "a-long-name.example": "a-lo…ample", "": "          ",
		"日本語日本語日本語": "日本…本語 "} {
		if got := fitName(s, 10); got != want && ansi.StringWidth(got) != 10 {
			t.Errorf("%q: %q, want %q", s, got, want)
		}
	}
	if got := graph([]float64{0, 1, 2, 4, 8}, 7); got != "  ▁▁▂▄█" {
		t.Errorf("%q", got)
	}
	if got := graph(nil, 3) + graph([]float64{0, 0}, 2); got != "   ▁▁" {
		t.Errorf("%q", got)
	}
	if got := latency(0) + latency(4.21) + latency(340) + latency(12000); got != "-4.2 ms340 ms12 s" {
		t.Error(got)
	}
	if got := count(99999) + " " + count(123456) + " " + count(12_000_000); got != "99999 123k 12M" {
		t.Error(got)
	}
}

// Without a terminal that can move its cursor there is an error that says what to use instead.
func TestNoTerminal(t *testing.T) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	err = Run(nil, Terminal{In: null, Out: null, Environ: []string{"TERM=xterm"}})
	if err == nil ||
		!strings.HasPrefix(err.Error(), "cannot show a live view: standard output is not a terminal: 'viasocks flows --watch'") {
		t.Error(err)
	}
	if term := (Terminal{Environ: []string{"TERM=a", "X=y", "TERM=dumb"}}).term(); term != "dumb" {
		t.Error(term)
	}
}
