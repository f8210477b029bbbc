package config

import (
	"cmp"
	"errors"
	"slices"
	"strings"

	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/socks"
)

// Variables in which the proxy is looked for if there is no --proxy, in this order. Other programs use them too, so
// they count only if they contain a SOCKS URL.
var proxyVars = []string{"ALL_PROXY", "all_proxy"}

func lookup(env []string, name string) string {
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, name+"="); ok {
			return v
		}
	}
	return ""
}

// finishProxy finds the proxy and puts it first among the upstreams.
func (c *Config) finishProxy(env []string) error {
	v := c.proxyAt
	for _, name := range proxyVars {
		if v.name != "" {
			break
		}
		if s := lookup(env, name); strings.HasPrefix(strings.ToLower(s), "socks") {
			v = value{name, strings.Clone(s), name + "=" + quote(s)}
		}
	}
	if v.name == "" {
		if v, ok := c.passwordFiles[DefaultUpstream]; ok {
			return v.err("there is no --proxy that it could belong to")
		}
		if len(c.Upstreams) > 0 || len(c.allow) > 0 || c.letsOut() || c.Command == Doctor {
			return c.finishServers(env)
		}
		return usagef(
			"no proxy was given: use --proxy socks5://HOST:PORT, or set VIASOCKS_PROXY, " +
				"or say with --allow or --rule what may go direct",
		)
	}
	c.proxyAt = v
	s, err := parseServer(v, v.text)
	if err != nil {
		return err
	}
	c.proxyAt = value{} // it may contain a password
	c.Default = DefaultUpstream
	c.Upstreams = append([]Upstream{{Name: DefaultUpstream, Server: s}}, c.Upstreams...)
	return c.finishServers(env)
}

// letsOut reports whether a rule lets flows out past every proxy. Then no proxy is needed.
func (c *Config) letsOut() bool {
	return slices.ContainsFunc(
		c.Rules,
		func(r route.Rule) bool { return r.Action() == route.ActionVia && r.Via() == route.DirectName },
	)
}

func parseServer(v value, rawurl string) (socks.Server, error) {
	s, err := socks.ParseServer(rawurl)
	if err != nil {
		// The wrapped error tells what is wrong, without a second "cannot use".
		return s, v.err("%v", cmp.Or(errors.Unwrap(err), err))
	}
	return s, nil
}
