package config

import (
	"strconv"

	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/route/relay"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack"
	"github.com/viasocks/viasocks/stack/flow"
)

// Command is a set of subcommands.
type Command uint32

// The subcommands that take options.
const (
	Run Command = 1 << iota
	Up
	Check
	Down
	Confirm
	Status
	Flows
	Ps
	Top
	Doctor // takes what Check takes, too
	Health
	Capture
	Exec
	ExcludeProgram
	IncludeProgram
	Attach
	Upgrade
)

// RunsProgram reports whether a program and its arguments follow the options.
func (c Command) RunsProgram() bool { return c&(Run|Exec|ExcludeProgram|IncludeProgram) != 0 }

// takes reports whether the option is one of cmd.
func (o *Option) takes(cmd Command) bool {
	return o.Cmds&cmd != 0 || cmd == Doctor && o.Cmds&Check != 0 && o.Cmds != Check
}

// all are the commands that carry traffic, or explain how they would.
const all = Run | Up | Attach | Check

var commandNames = []struct {
	cmd  Command
	name string
}{{Run, "run"}, {Up, "up"}, {Down, "down"}, {Confirm, "confirm"}, {Status, "status"}, {Flows, "flows"}, {Ps, "ps"}, {Top, "top"},
	{Doctor, "doctor"}, {Health, "health"}, {Capture, "capture"}, {Exec, "exec"}, {ExcludeProgram, "exclude"},
	{IncludeProgram, "include"}, {Attach, "attach"}, {Upgrade, "upgrade"}}

// commandName returns the name of one subcommand.
func commandName(cmd Command) string {
	for _, n := range commandNames {
		if n.cmd == cmd {
			return n.name
		}
	}
	return ""
}

// Option is one long option: a flag, a word of the configuration file, a line of the help and an item of the manual.
type Option struct {
	Name    string
	Arg     string // stands for the value in help and manual; empty: the option has no value
	Default string // shown in the help, and used
	Soft    bool   // the default is shown but not set: the layer that uses it may choose less
	Many    bool   // may be given more than once
	Secret  bool   // the value may contain a password: a variable that ends in _FILE may name a file with it
	Live    bool   // a reload changes it; otherwise a running daemon keeps its value, see Config.Again
	Cmds    Command
	Help    string // one line
	Steered string // the same for attach and down, if it means another thing there; empty: Help
	Man     string // paragraphs of mdoc, for what does not fit into the help
	set     func(*Config, value) error
}

// optionGroups are the options by subject, in the order of help and manual.
var optionGroups = []struct {
	title   string // the subsection of the manual
	options []Option
}{
	{"Proxies, names and limits", flowOptions},
	{"Other resolvers for some names", splitOptions},
	{"Reaching a program of run", publishOptions},
	{"Reaching this host from run", reachOptions},
	{"Peers that connect to a program of run", append(incomingOptions, ftpOptions...)},
	{"User and network namespace of run", runAsOptions},
	{"Telling programs of run apart", instanceOptions},
	{"Faster connections to the proxy", tuningOptions},
	{"Rules", ruleOptions}, {"Ping", pingOptions},
	{"The whole host", hostOptions},
	{"A container", attachOptions},
	{"Finding faults", doctorOptions},
	{"Capturing packets", captureOptions},
	{"Log, output and files", logOptions},
}

// Options contains every option, in the order of help and manual.
var Options = allOptions()

func allOptions() (list []Option) {
	for _, g := range optionGroups {
		list = append(list, g.options...)
	}
	return list
}

// flowOptions tell how captured traffic is carried.
var flowOptions = []Option{
	{
		Name: "proxy", Arg: "URL", Secret: true, Live: true, Cmds: all | Doctor, set: setProxy,
		Help: "socks5://[USER[:PASSWORD]@]HOST:PORT, carries what no rule says otherwise",
		Man: `The proxy:
.Ar socks5://[USER[:PASSWORD]@]HOST:PORT .
It is the upstream named
.Cm proxy ,
and carries every flow that no rule gives to another.
.Ar HOST
is a name or an address (IPv6 in brackets); the port may be left out and is then 1080.
.Cm socks5h
and
.Cm socks ,
which desktops write, mean the same.
Other kinds of proxies and how they are reached are described in
.Em PROXIES
in
.Xr viasocks.conf 5 .
A link-local address needs the device that it is reached by:
.Ar socks5://[fe80::1%25eth0]:1080 .
A password given here is wiped from the process title at once, but stays in the history of the shell;
.Fl -password-file
avoids that.
Without this option see
.Em ENVIRONMENT
in
.Xr viasocks.conf 5 .`,
	},
	{
		Name: "password-file", Arg: "[NAME=]FILE", Many: true, Live: true, Cmds: all | Doctor, set: addPasswordFile,
		Help: "the first line is the password for --proxy, or for the upstream NAME",
		Man: `The first line of
.Ar FILE ,
255 bytes at most, is the password of the user named in
.Fl -proxy ,
or, with
.Ar NAME= ,
in the
.Fl -upstream
of this name.
Where neither the URL nor this option has the password, it is taken from the environment or from systemd, see
.Em ENVIRONMENT
in
.Xr viasocks.conf 5 .
A file that every user can read, or that another user can write, is used with a warning.`,
	},
	{
		Name: "proxy-ca", Arg: "FILE", Live: true, Cmds: all | Doctor, set: setProxyCA,
		Help: "certificates in PEM that proxies inside TLS are verified by",
		Man: `Proxies inside TLS
.Pq Cm https , +tls
are verified with the certificates in
.Ar FILE ,
in PEM, instead of those that the system trusts.
Verification cannot be turned off.`,
	},
	{
		Name: "upstream", Arg: "NAME=URL[,URL...]", Many: true, Secret: true, Live: true, Cmds: all | Doctor, set: addUpstream,
		Help: "one more proxy, or a group of them, for rules to name",
		Man: `One more proxy, or a group of proxies that carry the same, for rules to name.
.Ar NAME
begins with a letter or digit and goes on with letters, digits, dots, underscores and hyphens, 64 at most;
.Cm proxy , direct , reject , drop
and
.Cm via
are taken.
Words may follow the URLs of a group, in the same argument:
.Ql NAME=URL,URL select=latched retry-after=1m ;
see
.Em GROUPS
in
.Xr viasocks.conf 5 .
The word
.Cm via
makes a chain: the proxy is reached through another upstream.
.Pp
At the start the proxy of
.Fl -proxy
must answer (if there is none, one of these); others that do not answer are a warning, and a refused login is always an error.`,
	},
	{
		Name: "dns", Arg: "MODE[,MODE...]", Default: defaultDNS, Soft: true, Live: true, Cmds: all, set: setDNS,
		Help: "fake, relay, or resolvers (tcp://, tls://, https://) that are asked through the proxy; off",
		Man: `How questions of the program to port 53 of whatever address are answered.
.Pp
.Ar fake[,RESOLVER...] :
each name gets an address of
.Fl -dns-pool
that stands for it, and a TCP connection to this address travels to the proxy as the name, which the proxy resolves.
It also works where the proxy refuses port 53, and where only the proxy knows the names.
Rules see the name, and no other address than the one that stands for it: a rule about the destination's network
.Pq Cm dst
does not match what goes to a name.
Questions over TCP are answered likewise, and zone transfers are refused.
A name that a rule sends
.Cm direct
is looked up by the host's own resolver.
Questions for other things than addresses (MX, TXT, SRV and the like) go to the resolvers, which are
.Ar 1.1.1.1
and
.Ar 9.9.9.9
if none are given.
UDP to such an address goes to the proxy by name as well where the proxy takes names there; see
.Em NAMES
in
.Xr viasocks 7 .
After a reload with another mode, addresses that were given out before still stand for their names.
This is the default where there is a proxy, unless one of the upstreams has only
.Cm socks4
proxies, which take no names.
.Pp
.Ar tcp://HOST[:PORT] ,
.Ar tls://HOST[:PORT][#NAME]
and
.Ar https://HOST[:PORT]/PATH[#NAME] ,
one or several with commas between them:
by these resolvers, which are asked through the proxy over TCP, over TLS (DoT, RFC 7858) or over HTTPS (DoH, RFC 8484, with
HTTP/2).
.Ar HOST
is an address, or a name, which the proxy then resolves.
The port is 53, 853 or 443 if none is given; most servers of DoH have
.Pa /dns-query
as their path.
The certificate must be for
.Ar HOST ,
or for
.Ar NAME
where that is given behind an address; see
.Fl -dns-ca .
Questions are not padded (RFC 8467): who sees their length may guess a name.
With
.Cm tor ,
which needs a
.Fl -proxy
that is a Tor
.Pq Cm ?tor ,
the Tor itself tells addresses of names and names of addresses, by its commands RESOLVE and RESOLVE_PTR.
It tells one address of a name, of IPv4 or of IPv6 as it likes, and no other types of records: for these the next resolver is
asked.
Where the proxy is a Tor
.Cm tor
comes first in the default.
A resolver without a scheme has that of the one before it:
.Ql tls://1.1.1.1,9.9.9.9 .
The resolvers are asked in their order: the next one when one cannot be reached, is silent, or answers SERVFAIL or REFUSED.
One that failed is asked last for 30 seconds.
While none of them works, questions get SERVFAIL at once, but for one at a time that tries again.
TCP connections to port 53 are carried to the first resolver if it is of
.Cm tcp://
and neither
.Fl -allow
nor
.Fl -dns-for
is given;
otherwise viasocks answers the questions in them, and zone transfers are refused.
The rules decide how a resolver is reached; where none matches it is reached by
.Fl -proxy .
Where there is no proxy at all the resolvers are asked directly, and those of the host's
.Pa /etc/resolv.conf
are the default of this option: they must answer over TCP, as RFC 7766 demands.
They are read at the start and at a reload.
.Cm up
leaves out a resolver that runs on the host itself, whose own questions would come back.
.Pp
.Ar relay[,RESOLVER...] :
by the very server that the program asks, through the proxy: over UDP, or over TCP where the proxy has no UDP.
Where rules speak of names, and with
.Fl -decisions ,
it is always TCP, so that no answer counts that is not one to a question.
The rules decide, as for other flows, but those about programs and users.
The proxy must be able to reach that server: a resolver of this host's own network is asked in the proxy's network.
The resolvers are for questions to an address that nobody can have, such as the one in the
.Pa /etc/resolv.conf
that
.Cm run
gives to the program.
Behind
.Ar fake,
this is for other questions than those for addresses; a server at an address that stands for a name is asked by it, over TCP.
.Pp
.Ar off :
port 53 is a port like others, which the rules and the proxy decide on.
Names reach rules only where something else tells them.
.Cm run
leaves the program the
.Pa /etc/resolv.conf
of the host; a server in it that runs on the host itself is out of its reach.
Another mode needs a restart.`,
	},
	{
		Name: "dns-ca", Arg: "FILE", Live: true, Cmds: all, set: setDNSCA,
		Help: "certificates in PEM that resolvers inside TLS are verified by",
		Man: `Resolvers inside TLS
.Pq Cm tls , https
are verified by the certificates in
.Ar FILE ,
in PEM, instead of those that the system trusts.
There is no way to leave the verification out.`,
	},
	{
		Name: "dns-pool", Arg: "NETWORK", Default: flow.Pool4.String(), Cmds: all, set: setDNSPool,
		Help: "the addresses that stand for names, with --dns fake",
		Man: `The IPv4 addresses that stand for names, with
.Fl -dns Cm fake :
all of
.Ar 198.18.0.0/15 ,
which viasocks keeps for itself, or a part of it that has 512 addresses at least; 256 of them stand for no name.
When all are given out the name that was asked for longest ago loses its address, but not while a connection uses it.`,
	},
	{
		Name: "dns-pool6", Arg: "NETWORK", Default: flow.Pool6.String(), Cmds: all, set: setDNSPool6,
		Help: "the same for IPv6",
		Man: `The IPv6 addresses that stand for names, with
.Fl -dns Cm fake :
a network inside
.Ar fd00::/8
that is a /64 or wider.
Neither this network nor that of
.Fl -dns-pool
may overlap a network that the host is connected to, or hold the address of a proxy or a resolver:
.Cm up
then refuses to start, or to take the configuration at a reload.`,
	},
	{
		Name: "dns-pool-file", Arg: "FILE", Cmds: all, set: setDNSPoolFile,
		Help: "keeps the names and their addresses over a restart, with --dns fake",
		Man: `With
.Fl -dns Cm fake :
a file that keeps which address stands for which name, so that programs that remember an address reach the same name after a
restart.
It is written every 10 seconds where something changed, and at the end; it holds every name that was asked for, and is made with
mode 600.
One file is for one viasocks.`,
	},
	{
		Name: "ipv6", Arg: "auto|on|off", Default: "auto", Cmds: all, set: setIPv6,
		Help: "whether names have an IPv6 address too, with --dns fake",
		Man: `With
.Fl -dns Cm fake :
whether a name has an IPv6 address that stands for it beside the IPv4 one.
.Cm auto :
where the program's network has IPv6, unless connections have shown that the proxy that carries the name does not.
A proxy has shown this when three different IPv6 addresses that programs connected to were unreachable for it (SOCKS5 replies 3, 4
and 8), and none was reached in the last ten minutes.
It is believed for five minutes, or until an IPv6 address is reached, the network changes, or the configuration is reloaded.
viasocks makes no connections of its own to find this out.
Where rules send a name by several proxies, the name has an IPv6 address if one of them may have IPv6.
.Cm on :
always;
.Cm off :
never.
.Pp
By which family the proxy reaches the name is the proxy's choice either way, so that programs need no IPv6 address to reach a
host that has nothing else, and a name that has only IPv4 is reached by its fake IPv6 address, too.
Some proxies try only one address of a name that has both families, most of them that of IPv6, and fail where that one is dead.
When a proxy answers that it cannot reach a name (SOCKS5 replies 3, 4 and 8), viasocks therefore asks the resolvers of
.Fl -dns
for the addresses of the name.
If it has both an IPv6 and an IPv4 address, viasocks connects to the IPv4 address, and if the proxy cannot reach that one, either,
to the IPv6 address, unless the proxy has shown that it has no IPv6.
Only then is the program refused.
After reply 8, which also comes from proxies that take no names, one address is enough.
This takes 3 seconds at most where no resolver answers.
.Cm status
shows what is known of a proxy's IPv6, and how many names were tried by address.
It is not done for refused connections (reply 5), for names without a dot, below
.Li .onion
and others that no public resolver knows, with a Tor
.Pq Cm ?tor ,
or where the rules decide otherwise on that address.`,
	},
	{
		Name: "connect-timeout", Arg: "TIME", Default: span(socks.DefaultConnectTimeout), Live: true, Cmds: all,
		set:  duration("100ms", "5m", func(c *Config) *timeDuration { return &c.ConnectTimeout }),
		Help: "how long reaching the proxy may take",
		Man:  `How long the TCP connection to the proxy may take, from 100ms to 5m.`,
	},
	{
		Name: "handshake-timeout", Arg: "TIME", Default: span(socks.DefaultHandshakeTimeout), Live: true, Cmds: all,
		set:  duration("100ms", "10m", func(c *Config) *timeDuration { return &c.HandshakeTimeout }),
		Help: "how long the proxy may take to answer",
		Man: `How long the whole SOCKS exchange may take, including the proxy's own connection to the destination, from 100ms to
10m.
If no answer comes in this time, the program's connection attempt stays unanswered, as with a silent destination.`,
	},
	{
		Name: "idle-timeout", Arg: "TIME", Default: span(relay.DefaultIdle), Live: true, Cmds: all,
		set:  duration("10s", "9h", func(c *Config) *timeDuration { return &c.IdleTimeout }),
		Help: "idle TCP connections are probed after this",
		Man: `A TCP connection that was idle for this long is probed by keepalive on both sides, and ended if the other end is
gone; from 10s to 9h (the kernel's limit).
A live connection is never ended, however long it is idle.
A connection that the program has closed and the far end has not ends as the kernel ends its own: a minute after the
program's FIN, or when the remaining data has not moved for a minute.`,
	},
	{
		Name: "udp-timeout", Arg: "TIME", Default: span(route.DefaultUDPTimeout), Live: true, Cmds: all,
		set:  duration("10s", "24h", func(c *Config) *timeDuration { return &c.UDPTimeout }),
		Help: "how long a UDP mapping lives without traffic and without a socket",
		Man: `How long the UDP mapping of a socket lives after the last datagram, from 10s to 24h (RFC 4787 asks for two minutes
at least),
where viasocks cannot find out whether the socket is open: for containers and virtual machines behind this host.
Elsewhere a mapping lives as long as its socket, and ends some 10 seconds after the socket was closed.`,
	},
	{
		Name: "max-pending", Arg: "N", Default: strconv.Itoa(stack.DefaultPending), Live: true, Cmds: all,
		set:  number(1, 1_000_000, func(c *Config) *int { return &c.MaxPending }),
		Help: "TCP connections that may wait for the proxy at a time",
		Man: `How many TCP connections may wait for the proxy's answer at a time, from 1 to 1000000.
Further ones are left unanswered, so that the program's kernel tries again a second later.`,
	},
	{
		Name: "max-pending-per-destination", Arg: "N", Default: strconv.Itoa(stack.DefaultPendingPerDest), Live: true, Cmds: all,
		set:  number(1, 1_000_000, func(c *Config) *int { return &c.MaxPendingPerDest }),
		Help: "the same for each destination address",
		Man:  `The same for each destination address; not more than` + "\n.Fl -max-pending .",
	},
	{
		Name: "max-mappings", Arg: "N", Default: strconv.Itoa(route.DefaultMappings), Soft: true, Live: true, Cmds: all,
		set:  number(1, 65536, func(c *Config) *int { return &c.MaxMappings }),
		Help: "UDP sockets of the program that have a mapping at a time",
		Man: `How many UDP mappings there may be at a time, from 1 to 65536.
Each holds two sockets to the proxy, so the default is less where the limit on open files is low.
If the limit is reached, the mapping that was idle longest ends.`,
	},
	{
		Name: "mtu", Arg: "BYTES", Default: "1500", Cmds: all, set: number(1280, 65535, func(c *Config) *int { return &c.MTU }),
		Help: "MTU of the TUN device",
		Man: `MTU of the TUN device, from 1280 (IPv6 needs that) to 65535.
Programs that measure the path see it; the speed does not depend on it.`,
	},
	{
		Name: "offload", Arg: "full|nouso|off", Default: "full", Cmds: all, set: setOffload,
		Help: "segmentation offload of the TUN device",
		Man: `Which segmentation offloads the TUN device uses:
.Cm full ;
.Cm nouso ,
without those of UDP;
.Cm off ,
none, for kernels that lack them: slow.`,
	},
	{
		Name: "udp-gso", Arg: "auto|on|off", Default: "auto", Live: true, Cmds: all, set: setUDPGSO,
		Help: "datagrams go to the proxy in runs that the kernel cuts",
		Man: `Whether datagrams of one size are handed to the kernel in runs, which it or the network card cuts into datagrams
again
.Pq Dv UDP_SEGMENT :
to send a burst then takes a quarter of the CPU time.
.Cm auto
is
.Cm on ,
except on Linux 7.0 to 7.1.4, where some network cards send such runs with wrong lengths and checksums, so that they are lost
without an error.
A host with such a kernel that is the router of neighbours also needs
.Fl -offload Cm nouso .
A kernel with that fault may have another version, such as that of the host of a virtual machine; if UDP through the proxy is
slow or lost, try
.Cm off .
.Cm status
shows what is in force, and why.`,
	},
	{
		Name: "keep-proxy-env", Cmds: Run | Check, set: boolean(func(c *Config) *bool { return &c.KeepProxyEnv }),
		Help: "leave http_proxy and its like in the program's environment",
		Man: `Leave
.Ev http_proxy , all_proxy , no_proxy
and all other variables whose name ends in
.Ev _proxy ,
in small letters or capitals, in the program's environment.
Without this option they are removed, because the program would otherwise use that proxy through ours.
.Ev VIASOCKS_*
is always removed.`,
	},
}

// fileOption is the only option that is not allowed in the file.
const fileOption = "config"

func find(name string) *Option {
	for i := range Options {
		if Options[i].Name == name {
			return &Options[i]
		}
	}
	return nil
}
