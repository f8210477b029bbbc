package route

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
)

// Limits of a file that a rule names. Public lists of domains have some hundred thousand lines of 20 bytes.
const (
	maxListBytes = 64 << 20
	maxListLines = 2_000_000
	maxListLine  = 1024
)

// list is the content of a file: one network, address or name on each line, and # before a comment. A name stands for
// itself and for every name below it, also if it is written with "." or "*." in front. A list never changes after it
// is read.
//
// Networks are sorted ranges without overlap, so a look-up is a binary search. Names are in a hash table that is
// searched for each suffix of a name.
type list struct {
	path   string
	v4     []range4
	v6     []range6
	names  map[string]struct{}
	labels int // of the longest name
	lines  int // lines with content
}

type range4 struct{ first, last uint32 }

type range6 struct{ first, last addr6 }

type addr6 struct{ hi, lo uint64 }

func (a addr6) compare(b addr6) int {
	return cmp.Or(cmp.Compare(a.hi, b.hi), cmp.Compare(a.lo, b.lo))
}

// loadList reads the file of a rule. An error names the file and the line.
func loadList(path string) (*list, error) {
	if path == "" {
		return nil, errors.New(`"list=" names no file: write list=/etc/viasocks/blocked.txt`)
	}
	f, err := os.Open(path)
	if err != nil {
		var perr *os.PathError
		if errors.As(err, &perr) {
			err = perr.Err
		}
		return nil, fmt.Errorf("cannot read the list %s: %w", path, err)
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil {
		return nil, fmt.Errorf("cannot read the list %s: %w", path, err)
	} else if info.IsDir() {
		return nil, fmt.Errorf("cannot read the list %s: it is a directory", path)
	}
	return readList(path, f)
}

// readList reads the lines of a list.
func readList(path string, from io.Reader) (*list, error) {
	l := &list{path: path, names: map[string]struct{}{}}
	limited := &io.LimitedReader{R: from, N: maxListBytes + 1}
	scan := bufio.NewScanner(bufio.NewReaderSize(limited, 64<<10))
	scan.Buffer(make([]byte, 0, maxListLine), maxListLine)
	n := 0
	for scan.Scan() {
		n++
		if err := l.add(scan.Bytes()); err != nil {
			return nil, fmt.Errorf("%s:%d: %w", path, n, err)
		}
		if l.lines > maxListLines {
			return nil, fmt.Errorf("cannot use the list %s: more than %d lines", path, maxListLines)
		}
	}
	switch err := scan.Err(); {
	case errors.Is(err, bufio.ErrTooLong):
		return nil, fmt.Errorf("%s:%d: the line is longer than %d bytes", path, n+1, maxListLine)
	case err != nil:
		return nil, fmt.Errorf("cannot read the list %s: %w", path, err)
	case limited.N == 0:
		return nil, fmt.Errorf("cannot use the list %s: longer than %d bytes", path, maxListBytes)
	}
	l.v4 = merged(l.v4, func(a, b range4) int { return cmp.Compare(a.first, b.first) }, func(a *range4, b range4) bool {
		if b.first > a.last && b.first-a.last > 1 {
			return false
		}
		a.last = max(a.last, b.last)
		return true
	})
	l.v6 = merged(l.v6, func(a, b range6) int { return a.first.compare(b.first) }, func(a *range6, b range6) bool {
		if b.first.compare(a.last) > 0 {
			return false
		}
		if b.last.compare(a.last) > 0 {
			a.last = b.last
		}
		return true
	})
	return l, nil
}

// merged sorts ranges and merges those for which join returns true.
func merged[T any](all []T, order func(a, b T) int, join func(a *T, b T) bool) []T {
	slices.SortFunc(all, order)
	out := all[:0]
	for _, r := range all {
		if len(out) == 0 || !join(&out[len(out)-1], r) {
			out = append(out, r)
		}
	}
	return slices.Clip(out)
}

// add adds one line.
func (l *list) add(line []byte) error {
	if len(line) > 3 && l.lines == 0 {
		line = bytes.TrimPrefix(line, []byte("\ufeff"))
	}
	for i, c := range line {
		if c == '#' && (i == 0 || line[i-1] == ' ' || line[i-1] == '\t') {
			line = line[:i]
			break
		}
	}
	line = bytes.Trim(line, " \t\r")
	if len(line) == 0 {
		return nil
	}
	l.lines++
	text := string(line)
	if strings.ContainsAny(text, ":/") || text[len(text)-1] >= '0' && text[len(text)-1] <= '9' && isNumbers(text) {
		p, err := parsePrefix(text)
		if err != nil {
			return err
		}
		l.addPrefix(p)
		return nil
	}
	name := strings.TrimPrefix(strings.TrimPrefix(plainName(text), "*"), ".")
	if err := checkDomain(name, false); err != nil {
		return fmt.Errorf("%q is neither a network nor a name: %w", clip(text), err)
	}
	l.names[name] = struct{}{}
	l.labels = max(l.labels, strings.Count(name, ".")+1)
	return nil
}

// isNumbers reports whether s can only be meant as an IPv4 address: no name ends in a label of digits (RFC 3696,
// section 2).
func isNumbers(s string) bool {
	return strings.Trim(s[strings.LastIndexByte(s, '.')+1:], "0123456789") == ""
}

func (l *list) addPrefix(p netip.Prefix) {
	if p.Addr().Is4() {
		b := p.Addr().As4()
		first := binary.BigEndian.Uint32(b[:])
		l.v4 = append(l.v4, range4{first, first | uint32(uint64(1)<<(32-p.Bits())-1)})
		return
	}
	first := sixteen(p.Addr())
	last := first
	switch bits := p.Bits(); {
	case bits >= 64:
		last.lo |= ^uint64(0) >> (bits - 64)
	default:
		last.hi |= ^uint64(0) >> bits
		last.lo = ^uint64(0)
	}
	l.v6 = append(l.v6, range6{first, last})
}

func sixteen(a netip.Addr) addr6 {
	b := a.As16()
	return addr6{binary.BigEndian.Uint64(b[:]), binary.BigEndian.Uint64(b[8:])}
}

// has reports whether the destination or one of its names is in the list. It does not allocate.
func (l *list) has(q *query) bool {
	if l.hasAddr(q.dst.Addr()) {
		return true
	}
	for _, name := range q.names {
		if l.hasName(name) {
			return true
		}
	}
	return false
}

func (l *list) hasAddr(a netip.Addr) bool {
	if a.Is4() {
		b := a.As4()
		x := binary.BigEndian.Uint32(b[:])
		lo, hi := 0, len(l.v4)
		for lo < hi {
			if mid := int(uint(lo+hi) >> 1); l.v4[mid].last < x {
				lo = mid + 1
			} else {
				hi = mid
			}
		}
		return lo < len(l.v4) && l.v4[lo].first <= x
	}
	if !a.IsValid() {
		return false
	}
	x := sixteen(a)
	lo, hi := 0, len(l.v6)
	for lo < hi {
		if mid := int(uint(lo+hi) >> 1); l.v6[mid].last.compare(x) < 0 {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo < len(l.v6) && l.v6[lo].first.compare(x) <= 0
}

// hasName reports whether a plain name is in the list, or below one that is.
func (l *list) hasName(name string) bool {
	if len(l.names) == 0 {
		return false
	}
	for skip := strings.Count(name, ".") + 1 - l.labels; skip > 0; skip-- { // no name in the list is that long
		name = name[strings.IndexByte(name, '.')+1:]
	}
	for {
		if _, ok := l.names[name]; ok {
			return true
		}
		dot := strings.IndexByte(name, '.')
		if dot < 0 {
			return false
		}
		name = name[dot+1:]
	}
}

// SameList reports whether two rules have lists with the same content, or none.
func (r *Rule) SameList(other *Rule) bool {
	if r.List() == "" || other.List() == "" {
		return r.List() == other.List()
	}
	a, b := r.rest.list, other.rest.list
	return slices.Equal(a.v4, b.v4) && slices.Equal(a.v6, b.v6) && maps.Equal(a.names, b.names)
}

// ListLen returns the number of lines with content in the rule's list.
func (r *Rule) ListLen() int {
	if r.List() == "" {
		return 0
	}
	return r.rest.list.lines
}
