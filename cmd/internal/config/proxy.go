package config

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/socks"
)

// Where the proxy is looked for when --proxy does not stand anywhere, in this order. The last two belong to everybody
// and count only when they hold a SOCKS URL.
var proxyVars = []string{"VIASOCKS_PROXY", "ALL_PROXY", "all_proxy"}

func lookup(env []string, name string) string {
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, name+"="); ok {
			return v
		}
	}
	return ""
}

// finishProxy finds the proxy, gives it its password and puts it first among the upstreams.
func (c *Config) finishProxy(env []string) error {
	v := c.proxyAt
	for _, name := range proxyVars {
		if v.name != "" {
			break
		}
		if s := lookup(env, name); s != "" && (name == proxyVars[0] || strings.HasPrefix(strings.ToLower(s), "socks")) {
			v = value{name, strings.Clone(s), name + "=" + quote(s)}
		}
	}
	if v.name == "" {
		if c.passwordFile.name != "" {
			return c.passwordFile.err("there is no --proxy that it could belong to")
		}
		if len(c.Upstreams) > 0 || c.letsOut() {
			return nil
		}
		return usagef("no proxy was given: use --proxy socks5://HOST:PORT, or set VIASOCKS_PROXY, or say with --rule what may go direct")
	}
	c.proxyAt = v
	s, err := parseServer(v, v.text)
	if err != nil {
		return err
	}
	if c.passwordFile.name != "" {
		if s, err = c.withPassword(s); err != nil {
			return err
		}
	}
	c.proxyAt = value{} // it may hold a password
	c.Default = DefaultUpstream
	c.Upstreams = append([]Upstream{{DefaultUpstream, s}}, c.Upstreams...)
	return nil
}

// letsOut reports whether a rule lets flows out past every proxy: then none is needed.
func (c *Config) letsOut() bool {
	return slices.ContainsFunc(c.Rules, func(r route.Rule) bool { return r.Action() == route.ActionVia && r.Via() == route.DirectName })
}

// maxPassword is what RFC 1929 has room for.
const maxPassword = 255

func (c *Config) withPassword(s socks.Server) (socks.Server, error) {
	v := c.passwordFile
	if s.User() == "" {
		return s, v.err("the proxy's URL names no user: write socks5://USER@HOST:PORT")
	}
	if u, err := url.Parse(c.proxyAt.text); err == nil && hasPassword(u) {
		return s, v.err("the proxy's URL has a password already: give it in one place")
	}
	b, info, err := readPath(v.text, int64(len(byteOrderMark))+maxPassword+2)
	if err != nil {
		return s, fmt.Errorf("cannot read the password file %s: %w", v.text, err)
	}
	line, _, _ := bytes.Cut(bytes.TrimPrefix(b, byteOrderMark), []byte("\n"))
	line = bytes.TrimSuffix(line, []byte("\r"))
	if len(line) == 0 {
		return s, fmt.Errorf("cannot use the password file %s: its first line is empty", v.text)
	}
	if len(line) > maxPassword {
		return s, fmt.Errorf("cannot use the password file %s: its first line is longer than %d bytes", v.text, maxPassword)
	}
	if info.Mode().IsRegular() && info.Mode().Perm()&0o004 != 0 {
		c.Warnings = append(c.Warnings, fmt.Sprintf("everybody can read the password file %s: chmod 600 it", v.text))
	}
	c.warnOfWriters("password file", v.text, info)
	return s.WithCredentials(s.User(), string(line))
}

func hasPassword(u *url.URL) bool {
	p, _ := u.User.Password()
	return p != ""
}

func parseServer(v value, rawurl string) (socks.Server, error) {
	s, err := socks.ParseServer(rawurl)
	if err != nil {
		// What it wraps says what is wrong, without "cannot use" again.
		return s, v.err("%v", cmp.Or(errors.Unwrap(err), err))
	}
	return s, nil
}
