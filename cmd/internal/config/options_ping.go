package config

import (
	"slices"
	"strconv"
	"strings"
)

// maxPingPorts limits the connections for one ping.
const maxPingPorts = 8

// pingOptions say whether ping gets an answer.
var pingOptions = []Option{
	{
		Name: "ping", Arg: "PORT[,...]|on|off", Default: "off", Live: true, Cmds: all, set: setPing,
		Help: "answer ping from the outcome of a TCP connect to these ports; on: 443,80",
		Man: `Answer ICMP and ICMPv6 echo requests of programs such as
.Xr ping 8 .
This is not a real ping.
No proxy carries ICMP, so
.Nm
connects to the destination by TCP, as the rules say for that port, closes the connection at once and answers from the
outcome.
.Em The time that ping shows is that of a TCP connect through the proxy ,
or close to zero if the outcome is known.
A service that pings to measure a distance or a loss of packets measures neither.
.Pp
The ports are tried in their order, 8 at most and each for four seconds, until the destination has granted or refused a
connection: it is there, and the request is answered.
.Cm on
stands for 443,80.
If no port shows that, a destination that the proxy reports as unreachable or not allowed, or that a rule rejects, gets ICMP
unreachable.
Otherwise there is no answer: the destination was silent, a rule drops, the proxy failed, or it answers without a reason, as
with SOCKS4.
A proxy that grants before it connects makes every destination seem to be there.
.Pp
A rule that names a program, a user or a control group cannot be applied to a ping: if it could decide, there is no answer.
With
.Fl -dns Cm fake
the ping of a name connects to the name.
An outcome is valid for a second, and requests that come meanwhile share it.
At most 1000 requests in a second are taken, and 64 destinations are asked at a time.
Requests in fragments, those over a limit, and all requests without this option are dropped and counted.`,
	},
}

func setPing(c *Config, v value) error {
	c.PingPorts = nil
	switch v.text {
	case "off":
		return nil
	case "on":
		c.PingPorts = []uint16{443, 80}
		return nil
	}
	for s := range strings.SplitSeq(v.text, ",") {
		n, err := strconv.ParseUint(s, 10, 16)
		switch {
		case err != nil || n == 0:
			return v.err("%q is not a port from 1 to 65535, and not on or off", s)
		case n == 53:
			return v.err("port 53 shows nothing: viasocks answers it")
		case !slices.Contains(c.PingPorts, uint16(n)):
			c.PingPorts = append(c.PingPorts, uint16(n))
		}
	}
	if len(c.PingPorts) > maxPingPorts {
		return v.err("more than %d ports", maxPingPorts)
	}
	return nil
}
