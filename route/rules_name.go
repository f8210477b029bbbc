package route

import (
	"fmt"
	"strings"
)

// maxDomain is the length of the longest DNS name as text, without the dot at its end (RFC 1035, section 2.3.4).
const maxDomain = 253

// namePattern is a name, a name with every name below it, or a pattern with * and ?. It is in lower case.
type namePattern struct {
	text string // for a suffix without its dot
	kind patternKind
}

type patternKind uint8

const (
	exactName patternKind = iota
	suffixName
	globName
)

// String returns the pattern as it is written.
func (p namePattern) String() string {
	if p.kind == suffixName {
		return "." + p.text
	}
	return p.text
}

func parsePatterns(list string) ([]namePattern, error) {
	return parseItems(list, "names", parsePattern)
}

func parsePattern(s string) (namePattern, error) {
	p := namePattern{text: plainName(s)}
	if strings.ContainsAny(p.text, "*?") {
		p.kind = globName
	} else if rest, ok := strings.CutPrefix(p.text, "."); ok {
		p.text, p.kind = rest, suffixName
	}
	if err := checkDomain(p.text, p.kind == globName); err != nil {
		return p, fmt.Errorf("name %q: %w", clip(s), err)
	}
	return p, nil
}

// checkDomain accepts what can be a name in DNS, including wildcards if wild is set.
func checkDomain(s string, wild bool) error {
	if s == "" || len(s) > maxDomain || strings.HasPrefix(s, ".") || strings.Contains(s, "..") {
		return fmt.Errorf("write a name such as example.com, .example.com or *.example.com, of at most %d letters", maxDomain)
	}
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.':
		case wild && (c == '*' || c == '?'):
		case c >= 0x80:
			return fmt.Errorf("write it as DNS knows it, in letters of ASCII (xn--...)")
		default:
			return fmt.Errorf("%q cannot stand in a name", c)
		}
	}
	return nil
}

// plainName returns a name in the form used for comparison: in lower case and without the dot at its end. It
// allocates only if something changes.
func plainName(s string) string { return strings.ToLower(strings.TrimSuffix(s, ".")) }

// matches reports whether a plain name matches the pattern.
func (p namePattern) matches(name string) bool {
	switch p.kind {
	case exactName:
		return name == p.text
	case suffixName:
		return isBelow(name, p.text)
	}
	return glob(p.text, name)
}

// isBelow reports whether name is suffix, or ends in a dot and suffix.
func isBelow(name, suffix string) bool {
	cut := len(name) - len(suffix)
	return strings.HasSuffix(name, suffix) && (cut == 0 || name[cut-1] == '.')
}

// glob reports whether s matches a pattern in which * stands for any text and ? for any byte. It takes at most
// len(pattern) times len(s) steps.
func glob(pattern, s string) bool {
	p, i := 0, 0
	star, mark := -1, 0
	for i < len(s) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, mark = p, i
			p++
		case p < len(pattern) && (pattern[p] == '?' || pattern[p] == s[i]):
			p++
			i++
		case star >= 0: // the last * takes one more byte
			mark++
			p, i = star+1, mark
		default:
			return false
		}
	}
	for p < len(pattern) && pattern[p] == '*' {
		p++
	}
	return p == len(pattern)
}
