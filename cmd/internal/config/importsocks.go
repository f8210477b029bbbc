package config

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/viasocks/viasocks/socks"
)

// ImportSocks reads files of Apache Traffic Server, socks.config and records.config or records.yaml in any order, and
// returns lines of our configuration with the same effect. Passwords are left out: the lines tell where they belong.
// An error names the file and the line.
func ImportSocks(paths []string) (lines []string, err error) {
	im := newSocksImport()
	for _, path := range paths {
		b, _, err := readPath(path, maxFile)
		if err != nil {
			return nil, fmt.Errorf("cannot read %s: %w", path, err)
		}
		if err := im.read(path, b); err != nil {
			return nil, err
		}
	}
	return im.lines()
}

// Limits of the import.
const (
	maxImportRules    = 1000
	prefixesEachRule  = 64 // with 64 IPv6 networks, a line is two thirds of the longest allowed
	maxImportPrefixes = 4096
)

// socksImport is what was read so far.
type socksImport struct {
	settings map[string]setting // settings below proxy.config.socks, by the word after that
	direct   []netip.Prefix     // no_socks
	parents  []parentLine
	user     string
	hasUser  bool
	prefixes int
}

// setting is a value and its place.
type setting struct{ text, where string }

// parentLine is a line with dest_ip.
type parentLine struct {
	where   string
	nets    []netip.Prefix
	servers []string // host:port
	sel     socks.Select
}

func newSocksImport() *socksImport { return &socksImport{settings: map[string]setting{}} }

// read reads one file.
func (im *socksImport) read(path string, b []byte) error {
	if len(b) > maxFile {
		return usagef("cannot import %s: longer than %d bytes", path, maxFile)
	}
	line := im.socksLine
	if strings.HasSuffix(path, ".yaml") || strings.HasSuffix(path, ".yml") {
		line = (&recordsYAML{im: im}).line
	}
	b = bytes.TrimPrefix(b, byteOrderMark)
	for n := 1; len(b) > 0; n++ {
		var raw []byte
		raw, b, _ = bytes.Cut(b, []byte("\n"))
		where := fmt.Sprintf("%s:%d", path, n)
		err := error(nil)
		switch text := strings.TrimRight(string(raw), " \t\r"); {
		case len(raw) > maxLine:
			err = fmt.Errorf("the line is longer than %d bytes", maxLine)
		case !utf8.Valid(raw):
			err = errors.New("not UTF-8 text")
		case strings.ContainsFunc(text, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }):
			err = errors.New("there is a control character in the line")
		default:
			err = line(where, text)
		}
		if err != nil {
			return usagef("%s: %v", where, err)
		}
	}
	return nil
}

// socksLine parses a line of socks.config or of records.config; their first words differ.
func (im *socksImport) socksLine(where, text string) error {
	text = strings.TrimSpace(text)
	if text == "" || text[0] == '#' {
		return nil
	}
	f := strings.Fields(text)
	switch {
	case f[0] == "CONFIG" || f[0] == "LOCAL":
		return im.record(where, f)
	case f[0] == "no_socks":
		return im.noSocks(strings.TrimPrefix(text, "no_socks"))
	case f[0] == "auth":
		if len(f) != 4 || f[1] != "u" {
			return errors.New("must be auth u USER PASSWORD")
		}
		if im.hasUser {
			return errors.New("auth is given twice")
		}
		im.user, im.hasUser = f[2], true
		return nil
	}
	return im.parent(where, text)
}

// record parses CONFIG NAME TYPE VALUE. It skips settings of other parts of Traffic Server.
func (im *socksImport) record(where string, f []string) error {
	if len(f) < 2 {
		return errors.New("must be CONFIG NAME TYPE VALUE")
	}
	name, ours := strings.CutPrefix(f[1], "proxy.config.socks.")
	if !ours {
		return nil
	}
	if len(f) < 3 || f[2] != "INT" && f[2] != "STRING" && f[2] != "FLOAT" && f[2] != "COUNTER" {
		return errors.New("must be CONFIG NAME TYPE VALUE")
	}
	return im.set(where, name, strings.Join(f[3:], " "))
}

func (im *socksImport) set(where, name, text string) error {
	if _, twice := im.settings[name]; twice {
		return fmt.Errorf("proxy.config.socks.%s is given twice", name)
	}
	if len(im.settings) >= maxImportRules {
		return errors.New("there are too many settings")
	}
	im.settings[name] = setting{text, where}
	return nil
}

// noSocks parses addresses and ranges, separated by commas or spaces.
func (im *socksImport) noSocks(list string) error {
	words := strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' || r == '\t' })
	if len(words) == 0 {
		return errors.New("no_socks needs addresses or ranges of addresses")
	}
	for _, w := range words {
		nets, err := im.networks(w)
		if err != nil {
			return err
		}
		im.direct = append(im.direct, nets...)
	}
	return nil
}

// parent parses dest_ip=RANGE parent="HOST:PORT;..." round_robin=WORD.
func (im *socksImport) parent(where, text string) error {
	p := parentLine{where: where}
	words, err := quotedWords(text)
	if err != nil {
		return err
	}
	said := map[string]bool{}
	for _, w := range words {
		key, value, _ := strings.Cut(w, "=")
		if said[key] {
			return fmt.Errorf("%s is given twice", key)
		}
		said[key] = true
		switch key {
		case "dest_ip":
			p.nets, err = im.networks(value)
		case "parent":
			p.servers, err = importServers(value)
		case "round_robin":
			var ok bool
			if p.sel, ok = roundRobin[value]; !ok {
				err = errors.New("round_robin must be strict, true, false or latched")
			}
		default:
			err = fmt.Errorf("%q cannot be carried over: known are dest_ip, parent, round_robin, no_socks and auth", key)
		}
		if err != nil {
			return err
		}
	}
	switch {
	case p.nets == nil:
		return errors.New("dest_ip is missing")
	case p.servers == nil:
		return errors.New("parent is missing")
	case len(im.parents) >= maxImportRules:
		return fmt.Errorf("there are more than %d lines with dest_ip", maxImportRules)
	}
	im.parents = append(im.parents, p)
	return nil
}

// roundRobin maps the words of round_robin. Traffic Server's true chooses by the client's address, for which its
// SOCKS client uses the destination's.
var roundRobin = map[string]socks.Select{
	"strict": socks.RoundRobin, "true": socks.Hash, "false": socks.Ordered, "latched": socks.Latched,
}

// quotedWords splits s at white space outside of double quotes, and removes the quotes.
func quotedWords(s string) (words []string, err error) {
	var w strings.Builder
	quoted := false
	for _, r := range s + " " {
		switch {
		case r == '"':
			quoted = !quoted
		case (r == ' ' || r == '\t') && !quoted:
			if w.Len() > 0 {
				words = append(words, w.String())
			}
			w.Reset()
		default:
			w.WriteRune(r)
		}
	}
	if quoted {
		return nil, errors.New("a quotation mark is not closed")
	}
	return words, nil
}

// importServers parses HOST:PORT entries, separated by semicolons, commas or spaces. Duplicates are dropped.
func importServers(list string) (servers []string, err error) {
	for _, s := range strings.FieldsFunc(list, func(r rune) bool { return r == ';' || r == ',' || r == ' ' || r == '\t' }) {
		i := strings.LastIndexByte(s, ':')
		if i <= 0 {
			return nil, fmt.Errorf("%q must be HOST:PORT", s)
		}
		server, err := socks.ParseServer("socks5://" + s)
		if err != nil || server.HasCredentials() || server.Host() == "" || strings.ContainsAny(s, "/?#@") || i == len(s)-1 {
			return nil, fmt.Errorf("%q must be HOST:PORT", s)
		}
		if !slices.Contains(servers, server.Where()) {
			servers = append(servers, server.Where())
		}
	}
	if len(servers) == 0 {
		return nil, errors.New("no server is named")
	}
	if len(servers) > socks.MaxServers {
		return nil, fmt.Errorf("a group has at most %d servers", socks.MaxServers)
	}
	return servers, nil
}

// networks converts an address, a network or FIRST-LAST to networks.
func (im *socksImport) networks(s string) (nets []netip.Prefix, err error) {
	defer func() {
		if im.prefixes += len(nets); err == nil && im.prefixes > maxImportPrefixes {
			err = fmt.Errorf("the addresses make more than %d networks", maxImportPrefixes)
		}
	}()
	if p, err := netip.ParsePrefix(s); err == nil {
		return []netip.Prefix{p.Masked()}, nil
	}
	first, last, isRange := strings.Cut(s, "-")
	if !isRange {
		last = first
	}
	a, err := netip.ParseAddr(first)
	b, err2 := netip.ParseAddr(last)
	if err != nil || err2 != nil || a.Zone() != "" || b.Zone() != "" || a.Is4() != b.Is4() || b.Less(a) {
		return nil, fmt.Errorf("%q is not an address, a network or a range of addresses", s)
	}
	return rangeNetworks(a, b), nil
}

// rangeNetworks returns the networks that exactly cover a to b. Each step takes the largest network that begins at a.
func rangeNetworks(a, b netip.Addr) (nets []netip.Prefix) {
	for {
		bits := a.BitLen()
		for bits > 0 {
			p, _ := a.Prefix(bits - 1)
			if p.Addr() != a || b.Less(lastOf(p)) {
				break
			}
			bits--
		}
		p := netip.PrefixFrom(a, bits)
		nets = append(nets, p)
		end := lastOf(p)
		if end == b {
			return nets
		}
		a = end.Next()
	}
}

// lastOf returns the last address of a network.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// serverURL returns the URL of one of the imported servers.
func (im *socksImport) serverURL(scheme, where string) string {
	u := url.URL{Scheme: scheme, Host: where}
	if im.hasUser && scheme == "socks5" {
		u.User = url.User(im.user)
	}
	return u.String()
}
