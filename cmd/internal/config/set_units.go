package config

import (
	"cmp"
	"errors"
	"regexp"
	"strings"
	"unicode"

	"github.com/viasocks/viasocks/route"
)

var unitRE = regexp.MustCompile(`^[A-Za-z0-9:_.@\\\\-]{1,240}\.(service|scope|slice)$`)

// addUnits parses [USER/]NAME[.service],...
func addUnits(c *Config, v value) error {
	for s := range strings.SplitSeq(v.text, ",") {
		var u Unit
		user, name, ok := strings.Cut(strings.TrimSpace(s), "/")
		if !ok {
			user, name = "", user
		}
		if !strings.Contains(name, ".") {
			name += ".service"
		}
		if !unitRE.MatchString(name) || strings.HasPrefix(name, ".") || strings.HasPrefix(name, "@") {
			return v.err("%q is not the name of a service, scope or slice", s)
		}
		if ok {
			r, why := parseUIDs(user)
			if why != "" || r.First != r.Last {
				return v.err("%s", cmp.Or(why, "one user is needed before the slash"))
			}
			u.User = &r.First
		}
		u.Name = name
		c.Host.ExcludeUnits = append(c.Host.ExcludeUnits, u)
	}
	return nil
}

// addExes lets programs out by rules that come before all others.
func addExes(c *Config, v value) error {
	for s := range strings.SplitSeq(v.text, ",") {
		path := strings.TrimSpace(s)
		// The words of a rule have spaces between them: a path with one would be read as something else.
		if !strings.HasPrefix(path, "/") && !strings.HasPrefix(path, "*") || strings.ContainsFunc(path, unicode.IsSpace) {
			return v.err("%q is not the absolute path of a program, without spaces, such as /usr/bin/curl", path)
		}
		r, err := route.ParseRule("exe " + path + " direct")
		if err != nil {
			return v.err("%v", cmp.Or(errors.Unwrap(err), err))
		}
		c.excludeExes = append(c.excludeExes, r)
	}
	return nil
}
