package config

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/stack/flow"
)

// splitOptions tell which names are looked up at other servers than those of --dns.
var splitOptions = []Option{
	{
		Name: "dns-for", Arg: "SUFFIX=SERVER[,SERVER...]", Many: true, Live: true, Cmds: all, set: addDNSFor,
		Help: "ask another server for a name and all names below it, such as corp.example=tcp://10.0.0.53",
		Man: `Ask
.Ar SERVER
for the name
.Ar SUFFIX
and every name below it, whatever
.Fl -dns
says.
With
.Fl -dns Cm fake
such names get their real addresses.
If several suffixes match a name, the longest one is used.
.Ar SERVER
is one of
.Bl -tag -width Ds
.It Ar tcp://ADDR , tls://HOST , https://HOST/PATH
A server that is asked through the proxy, or as the rules say, like those of
.Fl -dns .
.It Ar direct:udp://ADDR
A server that is asked directly, past every proxy: by UDP, and by TCP for long answers.
.It Ar direct:tcp://ADDR
The same, by TCP only.
.It Cm direct
The servers of this host: those in
.Pa /etc/resolv.conf ,
or, in place of the stub of systemd-resolved where
.Cm up
carries the whole host, those that systemd-resolved asks.
.El
.Pp
Further servers are asked when the first one fails.
A server that runs on a host that
.Cm up
carries is of use only if its own questions are excluded, for example with
.Fl -exclude-cgroup ;
.Cm up
leaves such servers out of those that
.Cm direct
means.
Reverse zones can be given too, such as
.Ar 10.in-addr.arpa=direct .
The names of flows to the real addresses are known to the rules for as long as the answers are valid.`,
	},
	{
		Name: "dns-exclude", Arg: "PATTERN[,PATTERN...]", Many: true, Live: true, Cmds: all, set: addDNSExclude,
		Help: "names that get their real addresses although --dns fake is used",
		Man: `With
.Fl -dns Cm fake :
names that get their real addresses from the resolvers.
Connections to them travel to the proxy as addresses.
.Ar PATTERN
is written as after
.Cm name
in
.Fl -rule :
.Li example.com
is this name,
.Li .example.com
is this name and every name below it, and an asterisk and a question mark stand for other text.
.Li list=FILE
excludes the names in a file, as in a rule.`,
	},
	{
		Name: "dns-search", Arg: "DOMAIN[,DOMAIN...]", Many: true, Cmds: Run, set: addDNSSearch,
		Help: "the domains that the program appends to short names, in place of the host's",
		Man: `The domains that the program's
.Pa /etc/resolv.conf
names for short names, in place of those of the host: six at most, or a dot for none.
.Pp
With
.Fl -dns Cm fake
every name has an address, so that the program takes the first domain for the right one: with the domain
.Li corp.example ,
.Ql ping intranet
means
.Li intranet.corp.example ,
and with a dot it means
.Li intranet ,
which the proxy's network may know.
For the same reason a name with a dot is then asked for as it is, whatever
.Li ndots
says in the host's file.`,
	},
	{
		Name: "dns-single-labels", Arg: "on|off", Default: "on", Live: true, Cmds: all, set: setSingleLabels,
		Help: "whether names without a dot exist, with --dns fake",
		Man: `With
.Fl -dns Cm fake :
whether a name without a dot, such as
.Li intranet ,
gets an address.
With
.Cm on
the name travels to the proxy as it is, and the proxy's network may know it.
With
.Cm off
the answer is that the name does not exist.
A name that
.Fl -dns-for
is about is resolved in either case.`,
	},
}

// maxSearch is glibc's own limit (resolv.conf(5)).
const maxSearch = 6

func addDNSSearch(c *Config, v value) error {
	for s := range strings.SplitSeq(v.text, ",") {
		if s != "." {
			if _, err := route.ParseNames(s); err != nil || strings.ContainsAny(s, "*?") || strings.HasPrefix(s, ".") {
				return v.err("must be a domain such as corp.example, or a dot for none")
			}
		}
		if c.Search = append(c.Search, s); len(c.Search) > maxSearch || len(c.Search) > 1 && slices.Contains(c.Search, ".") {
			return v.err("must be %d domains at most, or a dot alone", maxSearch)
		}
	}
	return nil
}

// maxSplit limits the number of zones.
const maxSplit = 64

func addDNSFor(c *Config, v value) error {
	z, err := route.ParseZone(v.text)
	if err != nil {
		return v.err("%v", err)
	}
	for _, have := range c.Split.Zones {
		if have.Suffix == z.Suffix {
			return v.err("%s is there already: give all of its servers in one option, with commas", z.Suffix)
		}
	}
	if len(z.Resolvers) > maxResolvers || len(z.Direct) > maxResolvers {
		return v.err("more than %d servers", maxResolvers)
	}
	if len(c.Split.Zones) == maxSplit {
		return v.err("more than %d zones", maxSplit)
	}
	c.Split.Zones = append(c.Split.Zones, z)
	return nil
}

func addDNSExclude(c *Config, v value) error {
	n, err := route.ParseNames(v.text)
	if err != nil {
		return v.err("%v", err)
	}
	if list := n.List(); list != "" {
		if info, err := os.Stat(list); err == nil {
			c.warnOfWriters("list", list, info)
		}
	}
	c.Split.Exclude = append(c.Split.Exclude, n)
	return nil
}

func setSingleLabels(c *Config, v value) error {
	switch v.text {
	case "on", "off":
		c.Split.NoSingleLabels = v.text == "off"
		return nil
	}
	return v.err("must be on or off")
}

// finishSplit warns of combinations that cannot work.
func (c *Config) finishSplit() {
	if !c.Fake.On && len(c.Split.Exclude) > 0 {
		c.Warnings = append(c.Warnings, "--dns-exclude has no effect without --dns fake: all names have their real addresses")
	}
	if !c.asksHost() {
		return
	}
	if _, err := HostServers(c.Command == Up); err != nil {
		c.Warnings = append(c.Warnings, fmt.Sprintf("names that are direct cannot be resolved: %v", err))
	}
}

// asksHost reports whether the host's own servers may be asked for some names.
func (c *Config) asksHost() bool {
	for _, z := range c.Split.Zones {
		if len(z.Resolvers)+len(z.Direct) == 0 {
			return true
		}
	}
	return c.Fake.On && slices.ContainsFunc(c.Rules, func(r route.Rule) bool { return r.Verdict() == route.DirectName })
}

// AsksDirect reports whether DNS questions may go past every proxy.
func (c *Config) AsksDirect() bool {
	for _, z := range c.Split.Zones {
		if len(z.Resolvers) == 0 {
			return true
		}
	}
	return false
}

// HostServers returns the servers that this host asks. If the whole host is carried (up), it leaves out a server on
// this host, whose own questions would come back to viasocks. It always leaves out our own address, which
// systemd-resolved may have been given.
func HostServers(up bool) ([]netip.AddrPort, error) {
	all, err := nameservers(resolvConf)
	if err != nil {
		return nil, fmt.Errorf("%w: name the server with --dns-for SUFFIX=direct:udp://ADDRESS", err)
	}
	usable := func(a netip.Addr) bool { return !flow.IsOurs(a) && !(up && a.IsLoopback()) }
	out := portsOf(all, usable)
	if len(out) == 0 && up {
		all, _ = nameservers(beyondStub)
		out = portsOf(all, usable)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("those in %s run on this host, and their own questions would come back to viasocks: "+
			"name others with --dns-for SUFFIX=direct:udp://ADDRESS", resolvConf)
	}
	return out, nil
}

func portsOf(all []netip.Addr, usable func(netip.Addr) bool) (out []netip.AddrPort) {
	for _, a := range all {
		if usable(a) && len(out) < maxResolvers {
			out = append(out, netip.AddrPortFrom(a, 53))
		}
	}
	return out
}
