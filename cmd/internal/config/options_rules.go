package config

import "github.com/viasocks/viasocks/route"

// ruleOptions tell which flows go where.
var ruleOptions = []Option{
	{
		Name: "rule", Arg: "RULE", Many: true, Live: true, Cmds: all, set: addRule,
		Help: "which flows go where; the first rule that matches decides",
		Man: `Which flows go where:
.Ql proto tcp port 25 reject ,
.Ql dst 203.0.113.0/24 via lab .
The first rule that matches decides; a flow that no rule matches goes to
.Fl -proxy ,
and is refused if there is none.
The conditions and verdicts are described in
.Em RULES
in
.Xr viasocks.conf 5 .
A rule with
.Cm direct
needs no proxy:
.Li viasocks run --rule 'port 443 direct' -- PROGRAM
lets a program reach port 443 and nothing else.`,
	},
	{
		Name: "allow", Arg: "PROTO:[HOST:]PORT", Many: true, Live: true, Cmds: all, set: addAllow,
		Help: "let only this out, such as tcp:db.example.com:5432 or tcp:443; refuse all else",
		Man: `Allow this traffic, and refuse at once everything that neither another
.Fl -allow
nor a
.Fl -rule
lets out.
.Ar PROTO
is
.Cm tcp
or
.Cm udp ,
.Ar PORT
a port, a range or several with commas, or an asterisk for all of them.
.Ar HOST
is an address (IPv6 in brackets), a network, or a name or pattern as in
.Cm name
of
.Fl -rule ;
without it the port of every host is meant.
The rules are asked first.
What is allowed goes by
.Fl -proxy
or, where there is no proxy, directly.
.Pp
A DNS question is a way out as well, because a name can carry data.
A name is therefore resolved only if a rule can need its addresses, and every other question is answered REFUSED at once.
A rule with a name needs this name, one for every host (such as
.Ar tcp:443 )
needs all names, and one for an address or a network needs none.
Where all names are needed, a program can still send data to the resolvers of
.Fl -dns
in its questions; it can also send data to the owner of
.Li example.com
if
.Ar tcp:.example.com:443
is allowed.
Questions over TCP are judged in the same way.
DNS operations other than questions (UPDATE, NOTIFY) and zone transfers are refused.
Conditions on the port, the source and the program do not count here: a name that one program needs is resolved for all.
.Pp
With
.Cm up
the rules do not see traffic that does not pass viasocks, such as that to private networks of the host: see
.Fl -lan .`,
	},
	{
		Name: "decisions", Arg: "FILE", Cmds: all, set: setDecisions,
		Help: "append a line of JSON to FILE for each verdict",
		Man: `Append a line to
.Ar FILE
(made with mode 600) for each verdict: when a TCP connection begins, and for datagrams when a pair of endpoints is new or its
verdict
changes.
Each line is an object of JSON with
.Cm time , proto , src , dst , verdict
and
.Cm rule ,
and as far as they are known
.Cm names
(what the program asked for),
.Cm uid , pid , exe
and
.Cm cgroup .
To name the program each connection waits until its owner is found.
When the file cannot be written as fast as verdicts are taken, lines are lost and no flow waits; a line with
.Cm lost
says how many are missing before it.
A question of DNS to UDP port 53 is a line with the name in
.Cm names
and the verdict
.Cm resolve
or
.Cm reject ,
without the program.
A question over TCP is such a line, too, where viasocks answers it, as with
.Fl -allow , -dns-for
and
.Fl -dns Cm fake .
Where it carries the connection to a resolver, the connection is a line without a name.`,
	},
	{
		Name: "sniff", Arg: "off|rules|name", Default: "off", Live: true, Cmds: all, set: setSniff,
		Help: "take the name of a TCP connection from what the program sends first",
		Man: `Take the name of a TCP connection whose destination is an address without a name from the server name of TLS or the
Host field of
HTTP:
.Cm rules
for rules and the log,
.Cm name
also for the proxy, which is then asked for the name in place of the address.
See
.Em NAMES IN RULES
in
.Xr viasocks.conf 5
for what is asked, and for what this costs.
Not possible together with
.Fl -allow
is
.Cm rules ,
because a program could say an allowed name to any address.`,
	},
	{
		Name: "sniff-port", Arg: "N[,...]", Default: defaultSniffPorts, Live: true, Cmds: all, set: setSniffPorts,
		Help: "the ports of the destinations that --sniff is for",
		Man: `The ports of the destinations that
.Fl -sniff
is for, 64 at most.
Connections to other ports are not touched.`,
	},
	{
		Name: "sniff-wait", Arg: "TIME", Default: span(route.DefaultSniffWait), Live: true, Cmds: all,
		set:  duration("10ms", "10s", func(c *Config) *timeDuration { return &c.SniffWait }),
		Help: "how long --sniff waits for the program's first bytes",
		Man: `How long
.Fl -sniff
waits for the program's first bytes, from 10ms to 10s.
A program that waits for its server to speak first is delayed by this time.`,
	},
	{
		Name: "rule-for", Arg: "FLOW", Many: true, Cmds: Check, set: addRuleFor,
		Help: "say which rule decides on a flow such as tcp:example.com:443, and why",
		Man: `Print which rule decides on a flow, and why, instead of the configuration.
.Ar FLOW
is
.Ar PROTO : Ns Ar HOST : Ns Ar PORT ,
with an IPv6 address in brackets; behind it may stand, with spaces between,
.Cm addr= Ns Ar ADDRESS
(for which the program's name stands),
.Cm src= Ns Ar ADDRESS ,
.Cm user= Ns Ar USER ,
.Cm exe= Ns Ar PATH
and
.Cm cgroup= Ns Ar PATH .
Nothing is resolved: a rule that depends on something that was not given is skipped, and the output says what to add.`,
	},
	{
		Name: "import-socks-config", Arg: "FILE", Many: true, Cmds: Check, set: addImport,
		Help: "print our lines for those of Apache Traffic Server's socks.config or records",
		Man: `Print lines for the configuration file that do what
.Ar FILE
says, instead of everything else that
.Cm check
does.
.Ar FILE
is Apache Traffic Server's
.Pa socks.config , records.config
or, by the end of its name,
.Pa records.yaml .
The files belong together: give all of them.
What the lines become is listed in
.Em SOCKS.CONFIG
in
.Xr viasocks.conf 5 .`,
	},
}
