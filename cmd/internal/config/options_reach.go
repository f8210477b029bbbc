package config

import (
	"slices"
	"strconv"
	"strings"

	"github.com/viasocks/viasocks/route"
)

// reachOptions say which services of the host a program in its own namespace may reach.
var reachOptions = []Option{
	{
		Name: "reach-host", Arg: "PORT[-PORT][,...]|all", Many: true, Cmds: Run | Check, set: addReachHost,
		Help: "services on the loopback of this host that the program may reach",
		Man: `Let the program reach services that listen on the loopback of this host, for example a database or a web server
under development.
Without this option it cannot.
The program finds them at the name
.Li host.viasocks.internal
and at the addresses 198.18.0.2 and fd76:6961:736f:636b::2, by TCP and UDP.
The name has these addresses whatever
.Fl -dns
says; with
.Fl -dns Cm off
it is an entry of the
.Pa /etc/hosts
that the program sees.
.Pp
A connection to 198.18.0.2 goes to 127.0.0.1 of this host or, if nobody listens there, to ::1; for the other address it is the
other way round.
Nothing but these two addresses is reached.
The services see connections from 127.0.0.1 or ::1, as from any program of this host, and may therefore trust the program
more than they should.
Name the ports that the program needs:
.Cm all
gives it every service of this host, including those which have no password because they listen on loopback only, and other
proxies, by which it could get past
.Nm .
The port of a proxy that
.Nm
itself uses is reached only if it is named.
Port 53 is never reached, because
.Nm
answers it.
.Pp
A rule that rejects or drops such a connection wins, for example
.Ql name host.viasocks.internal port 22 reject ;
other rules do not matter, since no proxy could carry it.
.Cm flows
and the log show the upstream
.Cm host .
A port that is not named refuses connections.`,
	},
}

// ReachHost are the ports of the host's loopback that the program may reach.
type ReachHost struct {
	All   bool
	Ports []Range[uint16]
}

// On reports whether any port may be reached.
func (r *ReachHost) On() bool { return r.All || len(r.Ports) > 0 }

// String returns the ports in the words of the option.
func (r *ReachHost) String() string {
	var words []string
	if r.All {
		words = append(words, "all")
	}
	for _, p := range r.Ports {
		words = append(words, p.String())
	}
	return strings.Join(words, ",")
}

// Names reports whether a port is in the list.
func (r *ReachHost) Names(port uint16) bool {
	return slices.ContainsFunc(r.Ports, func(p Range[uint16]) bool { return p.First <= port && port <= p.Last })
}

func addReachHost(c *Config, v value) error {
	if v.text == "all" {
		c.ReachHost.All = true
		return nil
	}
	return listOf(func(c *Config) *[]Range[uint16] { return &c.ReachHost.Ports }, func(s string) (Range[uint16], string) {
		r, ok := parseRange[uint16](s, 16)
		switch {
		case !ok || r.First == 0:
			return r, strconv.Quote(s) + " is not a port from 1 to 65535, a range like 8000-8010, or all"
		case r.First <= 53 && 53 <= r.Last:
			return r, "port 53 cannot be reached: viasocks answers it"
		}
		return r, ""
	})(c, v)
}

// checkReachHost refuses a configuration in which flows to the host could not be told from those of an upstream.
func (c *Config) checkReachHost() error {
	if c.ReachHost.On() && slices.ContainsFunc(c.Upstreams, func(u Upstream) bool { return u.Name == route.HostUpstream }) {
		return usagef("cannot use --reach-host with an upstream named %s: give the upstream another name", route.HostUpstream)
	}
	return nil
}
