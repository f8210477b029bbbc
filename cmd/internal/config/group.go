package config

import (
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/viasocks/viasocks/socks"
)

// nextURL matches the start of another URL in a list. A comma alone may be part of a password.
var nextURL = regexp.MustCompile(`,[A-Za-z0-9+.-]+://`)

// splitURLs splits a list of URLs.
func splitURLs(list string) (urls []string) {
	begin := 0
	for _, i := range nextURL.FindAllStringIndex(list, -1) {
		urls = append(urls, list[begin:i[0]])
		begin = i[0] + 1
	}
	return append(urls, list[begin:])
}

// parseGroup parses what follows the name of an upstream: URLs, and words that tell how the group chooses.
func parseGroup(v value, u Upstream, text string) (Upstream, error) {
	fields := strings.Fields(text)
	if len(fields) == 0 {
		return u, v.err("must be NAME=URL")
	}
	for _, url := range splitURLs(fields[0]) {
		s, err := parseServer(v, url)
		if err != nil {
			return u, err
		}
		for _, have := range u.Servers() {
			if have.String() == s.String() {
				return u, v.err("%s is named twice", s)
			}
		}
		if u.Server == (socks.Server{}) {
			u.Server = s
		} else {
			u.More = append(u.More, s)
		}
	}
	if len(u.More) >= socks.MaxServers {
		return u, v.err("a group has at most %d servers", socks.MaxServers)
	}
	said := map[string]bool{}
	for _, f := range fields[1:] {
		word, text, ok := strings.Cut(f, "=")
		set := groupWords[word]
		switch {
		case !ok || set == nil && word != "via":
			return u, v.err(
				"there is no word %q; the words are via, select, attempts, server-attempts, fail-threshold, fail-window, "+
					"retry-after, connect-timeout, handshake-timeout and check",
				Redact(f),
			)
		case said[word]:
			return u, v.err("%s is given twice", word)
		}
		said[word] = true
		if word == "via" {
			if why := setVia(&u, text); why != "" {
				return u, v.err("via %s", why)
			}
			continue
		}
		if why := set(&u.Group, text); why != "" {
			return u, v.err("%s %s", word, why)
		}
	}
	return u, nil
}

// groupWords set the options of a group. They return what is wrong, or "".
var groupWords = map[string]func(*socks.GroupOptions, string) string{
	"select": func(o *socks.GroupOptions, s string) string {
		var err error
		if o.Select, err = socks.ParseSelect(s); err != nil {
			return err.Error()
		}
		return ""
	},
	"attempts":          groupNumber(func(o *socks.GroupOptions) *int { return &o.Attempts }),
	"server-attempts":   groupNumber(func(o *socks.GroupOptions) *int { return &o.ServerAttempts }),
	"fail-threshold":    groupNumber(func(o *socks.GroupOptions) *int { return &o.FailThreshold }),
	"fail-window":       groupTime("1s", "24h", func(o *socks.GroupOptions) *time.Duration { return &o.FailWindow }),
	"retry-after":       groupTime("1s", "24h", func(o *socks.GroupOptions) *time.Duration { return &o.RetryAfter }),
	"connect-timeout":   groupTime("100ms", "5m", func(o *socks.GroupOptions) *time.Duration { return &o.ConnectTimeout }),
	"handshake-timeout": groupTime("100ms", "10m", func(o *socks.GroupOptions) *time.Duration { return &o.HandshakeTimeout }),
	"check":             groupTime("1s", "24h", func(o *socks.GroupOptions) *time.Duration { return &o.Check }),
}

func groupNumber(field func(*socks.GroupOptions) *int) func(*socks.GroupOptions, string) string {
	return func(o *socks.GroupOptions, s string) string {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 || n > 100 {
			return "must be a number from 1 to 100"
		}
		*field(o) = n
		return ""
	}
}

func groupTime(lo, hi string, field func(*socks.GroupOptions) *time.Duration) func(*socks.GroupOptions, string) string {
	l, h := mustDuration(lo), mustDuration(hi)
	return func(o *socks.GroupOptions, s string) string {
		d, err := time.ParseDuration(s)
		if err != nil || d < l || d > h {
			return "must be a time from " + lo + " to " + hi
		}
		*field(o) = d
		return ""
	}
}
