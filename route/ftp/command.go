package ftp

import (
	"bytes"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// MaxLine is the length up to which a command is examined, including its line end. Longer lines pass unchanged.
const MaxLine = 512

// command is a PORT or EPRT that names an endpoint of the program.
type command struct {
	eprt bool
	at   netip.AddrPort
	end  string // the line end that the program uses
}

// parse parses a line, including its line end. ok is false for everything that is no valid PORT or EPRT.
func parse(line []byte) (c command, ok bool) {
	if len(line) > MaxLine || !bytes.HasSuffix(line, []byte("\n")) {
		return c, false
	}
	text := string(line[:len(line)-1])
	c.end = "\n"
	if strings.HasSuffix(text, "\r") {
		text, c.end = text[:len(text)-1], "\r\n"
	}
	verb, arg, _ := strings.Cut(text, " ")
	arg = strings.Trim(arg, " ")
	switch {
	case strings.EqualFold(verb, "PORT"):
		c.at, ok = parsePort(arg)
	case strings.EqualFold(verb, "EPRT"):
		c.eprt = true
		c.at, ok = parseEPRT(arg)
	}
	return c, ok
}

// parsePort parses h1,h2,h3,h4,p1,p2 (RFC 959, section 4.1.2).
func parsePort(arg string) (at netip.AddrPort, ok bool) {
	var b [6]byte
	fields := strings.Split(arg, ",")
	if len(fields) != len(b) {
		return at, false
	}
	for i, f := range fields {
		n, err := strconv.ParseUint(f, 10, 8)
		if err != nil {
			return at, false
		}
		b[i] = byte(n)
	}
	port := uint16(b[4])<<8 | uint16(b[5])
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[:4])), port), port != 0
}

// parseEPRT parses |1|ADDRESS|PORT| and |2|ADDRESS|PORT| with any delimiter (RFC 2428, section 2).
func parseEPRT(arg string) (at netip.AddrPort, ok bool) {
	if arg == "" || arg[0] < 33 || arg[0] > 126 {
		return at, false
	}
	fields := strings.Split(arg, arg[:1])
	if len(fields) != 5 || fields[0] != "" || fields[4] != "" {
		return at, false
	}
	addr, err := netip.ParseAddr(fields[2])
	if err != nil || addr.Zone() != "" || addr.Is4In6() {
		return at, false
	}
	port, err := strconv.ParseUint(fields[3], 10, 16)
	if err != nil || port == 0 || fields[1] != family(addr) {
		return at, false
	}
	return netip.AddrPortFrom(addr, uint16(port)), true
}

// family returns the number of a's family in EPRT.
func family(a netip.Addr) string {
	if a.Is4() {
		return "1"
	}
	return "2"
}

// with returns the command with another endpoint. PORT cannot express an IPv6 address and becomes EPRT.
func (c command) with(at netip.AddrPort) []byte {
	a := at.Addr().Unmap()
	if c.eprt || !a.Is4() {
		return fmt.Appendf(nil, "EPRT |%s|%v|%d|%s", family(a), a, at.Port(), c.end)
	}
	b := a.As4()
	return fmt.Appendf(nil, "PORT %d,%d,%d,%d,%d,%d%s", b[0], b[1], b[2], b[3], at.Port()>>8, at.Port()&0xff, c.end)
}

// refused returns the command without its argument, which every server refuses with 500 or 501. The server's own answer
// comes in its place among the others, as one that we made up would not, and programs then use PASV.
func (c command) refused() []byte {
	if c.eprt {
		return []byte("EPRT" + c.end)
	}
	return []byte("PORT" + c.end)
}

// mayBe reports whether b, the beginning of a line, may become a command of ours.
func mayBe(b []byte) bool {
	n := min(len(b), 5)
	return strings.EqualFold(string(b[:n]), "PORT "[:n]) || strings.EqualFold(string(b[:n]), "EPRT "[:n])
}
