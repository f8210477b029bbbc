package ftp

import "bytes"

// handshake is the first byte of a TLS record of the type handshake (RFC 8446, section 5.1). No command begins with it.
const handshake = 22

// scanner finds the commands in what the program says.
type scanner struct {
	in      []byte // not examined yet
	midline bool   // the rest of the line passes unread
	blind   bool   // everything passes unread, because it is encrypted
}

// next moves what needs no change from s.in to out. It stops at a command of ours, which is then removed from s.in, and
// otherwise keeps only the beginning of a line that may become one.
func (s *scanner) next(out []byte, ours func(command) bool) ([]byte, *command) {
	for len(s.in) > 0 {
		n := len(s.in) // what passes
		end := bytes.IndexByte(s.in, '\n') + 1
		switch {
		case s.blind:
		case s.midline:
			if end > 0 {
				n, s.midline = end, false
			}
		case s.in[0] == handshake:
			s.blind = true
		case !mayBe(s.in), end == 0 && len(s.in) >= MaxLine:
			s.midline = true
			continue
		case end == 0:
			return out, nil
		default:
			c, ok := parse(s.in[:end])
			if ok && ours(c) {
				s.drop(end)
				return out, &c
			}
			n = end
		}
		out = append(out, s.in[:n]...)
		s.drop(n)
	}
	return out, nil
}

// drop removes n bytes from the front.
func (s *scanner) drop(n int) {
	if s.in = s.in[n:]; len(s.in) == 0 {
		s.in = nil
	}
}

// flush returns the rest, after which nothing comes.
func (s *scanner) flush(out []byte) []byte {
	out = append(out, s.in...)
	s.in = nil
	return out
}
