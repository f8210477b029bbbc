package config

import (
	"slices"

	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/socks"
)

// Reached returns the servers of u to which our own sockets connect. There are none if u is reached through another
// upstream.
func (u *Upstream) Reached() []socks.Server {
	if u.Via != "" {
		return nil
	}
	return u.Servers()
}

// setVia sets the word via of an upstream. Whether an upstream with that name exists is known when all options have
// been read.
func setVia(u *Upstream, name string) string {
	if err := route.CheckName(name); err != nil {
		return "must be the name of another upstream: " + err.Error()
	}
	if name == u.Name {
		return "names the upstream itself: it must be another one"
	}
	if name == route.DirectName {
		return "direct is what holds without it: leave it out"
	}
	u.Via = name
	return ""
}

// checkChains checks that every upstream can be reached, so that no chain is a cycle.
func (c *Config) checkChains() error {
	for _, u := range c.Upstreams {
		if u.Via == "" {
			continue
		}
		for _, s := range u.Servers() {
			if s.Unix() != "" {
				return usagef(
					"cannot use the upstream %s: the socket %s cannot be reached via %s: give the server's address",
					u.Name,
					s.Where(),
					u.Via,
				)
			}
		}
		path := []string{u.Name}
		for next := u.Via; next != ""; {
			i := slices.IndexFunc(c.Upstreams, func(v Upstream) bool { return v.Name == next })
			if i < 0 {
				return usagef("cannot use the upstream %s: its via names the upstream %s, which does not exist",
					path[len(path)-1], next)
			}
			if slices.Contains(path, next) {
				return usagef(
					"cannot use the upstream %s: its chain of via comes back to %s and never reaches a server",
					u.Name,
					next,
				)
			}
			path = append(path, next)
			next = c.Upstreams[i].Via
		}
	}
	return nil
}
