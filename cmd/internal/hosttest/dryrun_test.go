package hosttest

import (
	"encoding/hex"
	"net"
	"net/netip"
	"regexp"
	"strings"
	"testing"
)

var (
	nftOwner  = regexp.MustCompile(`(?m)^\s*flags owner.*\n|^\s*\n| # progname .*$`) // who made it, not what it does
	nftLapses = regexp.MustCompile(` expires \w+`)
	// what the filter itself puts into its sets
	nftNoted = regexp.MustCompile(`(?s)(set (?:spoke|served|came|fwd_|dhcp)\w* \{[^}]*?)\n\s*elements = \{.*?\}`)
)

// nftWords say what nft(8) shows of a rule that was not typed, but encoded, as it would show it if it had been typed.
var nftWords = []struct {
	raw  *regexp.Regexp
	word string
}{
	{regexp.MustCompile(`meta protocol ip6? (@nh|meta l4proto|update|udp sport)`), "$1"},
	{regexp.MustCompile(`@nh,128,32`), "ip daddr"},
	{regexp.MustCompile(`@nh,96,32`), "ip saddr"},
	{regexp.MustCompile(`@nh,192,128`), "ip6 daddr"},
	{regexp.MustCompile(`@nh,64,128`), "ip6 saddr"},
	{regexp.MustCompile(`@nh,56,8 0xff`), "ip6 hoplimit 255"},
	{regexp.MustCompile(`@nh,56,8 0x1`), "ip6 hoplimit 1"},
	{regexp.MustCompile(`"" timeout`), `"` + tunName + `" timeout`},
}

// nftAddress is a network of which nft(8) shows bits: of IPv4, less its leading zeros.
var nftAddress = regexp.MustCompile(`daddr (?:& 0x([0-9a-f]+) == )?0x([0-9a-f]+)`)

func nftTyped(s string) string {
	for _, w := range nftWords {
		s = w.raw.ReplaceAllString(s, w.word)
	}
	return nftAddress.ReplaceAllStringFunc(s, func(m string) string {
		f := nftAddress.FindStringSubmatch(m)
		digits := 8
		if len(f[2]) > digits || len(f[1]) > digits {
			digits = 32
		}
		b, err := hex.DecodeString(strings.Repeat("0", digits-len(f[2])) + f[2])
		a, ok := netip.AddrFromSlice(b)
		if err != nil || !ok {
			return m
		}
		if f[1] == "" {
			return "daddr " + a.String()
		}
		mask, err := hex.DecodeString(strings.Repeat("0", digits-len(f[1])) + f[1])
		if err != nil {
			return m
		}
		ones, _ := net.IPMask(mask).Size()
		return "daddr " + netip.PrefixFrom(a, ones).String()
	})
}

// installed is what dry-run speaks of.
func (w *world) installed() map[string]string {
	w.t.Helper()
	s := map[string]string{
		"ip rule":  w.ip("host", "-4 rule"),
		"ip6 rule": w.ip("host", "-6 rule"),
		"table T":  strings.ReplaceAll(w.tableT(), " linkdown", ""),
		"refusing": w.ip("host", "-4 route show table "+closedID),
		"sysctl":   w.run("host", nil, "sysctl", "net.ipv4.conf.all.src_valid_mark"),
	}
	for line := range strings.Lines(w.run("host", nil, "nft", "list", "tables")) {
		if f := strings.Fields(line); len(f) == 3 && f[2] == "viasocks" {
			out := w.run("host", nil, "nft", "-s", "list", "table", f[1], f[2])
			s[line] = nftTyped(
				nftLapses.ReplaceAllString(nftOwner.ReplaceAllString(nftNoted.ReplaceAllString(out, "$1"), ""), ""),
			)
		}
	}
	return s
}

// TestDryRun: a dry run touches nothing, and who types its lines has what `up` installs.
func TestDryRun(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	w.proxy(proxy4 + ":1080")
	before := w.state()
	for _, flags := range [][]string{
		nil,
		{"--strict", "--inbound", "carry", "--lan", "carry"},
		{"--inbound", "carry", "--exclude-device", "br0,wg9", "--inbound-port", "53"},
		{"--inbound-port", "51820,27015-27020", "--lan", "refuse", "--exclude", chosenNets, "--exclude-uid", "7,60000-65534",
			"--exclude-port", "123,853-860", "--exclude-device", "br0,wg9"},
		{"--include", chosenNets, "--include-uid", "7,60000-65534", "--include-port", "123,853-860", "--include-device",
			"br0,wg9", "--exclude", "203.0.113.9"},
	} {
		flags = append([]string{"--proxy", "socks5://" + proxy4 + ":1080"}, flags...)
		lines, err := w.command(append([]string{"up", "--log-level", "error", "--dry-run"}, flags...)...)
		if err != nil {
			t.Fatalf("%v: %v\n%s", flags, err, lines)
		}
		w.same("after a dry run", before, w.state())

		d := w.up(flags...)
		want := w.installed()
		if err := d.stop(); err != nil {
			t.Error(err)
		}
		w.same("after the stop", before, w.state())

		w.ip("host", "tuntap add dev "+tunName+" mode tun\nlink set "+tunName+" up\naddr add 198.18.0.1/32 dev "+tunName+
			"\naddr add fd76:6961:736f:636b::1/128 dev "+tunName+" nodad")
		var filter strings.Builder // all at once: what it says of the daemon's life lapses after ten seconds
		for line := range strings.Lines(lines) {
			if nft, ok := strings.CutPrefix(line, "nft "); ok {
				filter.WriteString(nft)
			} else if !strings.HasPrefix(line, "#") {
				w.run("host", nil, strings.Fields(line)...)
			}
		}
		w.nft("host", filter.String())
		got := w.installed()
		if len(got) != len(want) || len(want) < 6 {
			t.Errorf("%v: %d tables and lists, want %d", flags, len(got), len(want))
		}
		w.equal("the lines of "+strings.Join(flags, " "), want, got)
		if out, err := w.command("down"); err != nil {
			t.Errorf("down: %v\n%s", err, out)
		}
		w.ip("host", "link del "+tunName) // its maker left no journal: it is not known to be ours
		w.sysctl("host", map[string]string{"net/ipv4/conf/all/src_valid_mark": "0"})
		w.same("after what was typed", before, w.state())
	}
}
