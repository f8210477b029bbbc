package config

import (
	"errors"
	"os"
	"path/filepath"
	"slices"

	"github.com/viasocks/viasocks/cmd/internal/incoming"
	"github.com/viasocks/viasocks/route/portmap"
)

// incomingOptions say at which ports peers behind the proxy can connect to a program.
var incomingOptions = []Option{
	{
		Name: "listen", Arg: "PORT[/tcp|/udp]|auto[=UPSTREAM]", Many: true, Live: true, Cmds: Run | Up | Check, set: addListen,
		Help: "let peers behind the proxy reach a port of the program",
		Man: `Let peers behind the proxy connect to the TCP port
.Ar PORT
on which the program listens.
The option asks the proxy, or
.Ar UPSTREAM ,
by the command BIND to listen for peers, at the same port if it can.
The log,
.Cm status
and
.Fl -on-port
say at which address and port peers reach the program then.
The program sees each connection come from the address that the proxy names as the peer's.
A dishonest proxy can name any address, even one of your own network, so that a program must not trust peers for their
addresses.
If it does not listen, the peer's connection is reset.
If the program itself connects to its port at the proxy, because a tracker has listed it among the peers, the connection is
refused.
.Pp
Once the proxy has shown that it knows BIND, viasocks asks it to listen for IPv6 as well, always at
.Ar PORT
itself, because no gateway can tell a program of another port for IPv6.
If the proxy cannot,
.Cm status
says so, and viasocks asks again every ten minutes.
.Pp
With
.Cm up ,
the option is about a program of this host.
The program must listen at all addresses of the host, or at the address from which the host's connections leave;
a program that listens at 127.0.0.1 only is not reached.
Its answers by TCP go back to the proxy, even if the program, its user or the peer's network is excluded.
Its datagrams are different: if the program, its user or the peer's network is excluded, they leave without the proxy, even if
they answer a peer.
A firewall of this host must accept connections to the port from the device of
.Fl -tun ;
if the firewall drops them, the peer's connection is reset after 15 seconds.
Every value of the setting rp_filter works.
If docker publishes the port, peers reach its container.
With
.Cm auto ,
or with any
.Ar PORT ,
viasocks answers the requests by NAT-PMP and PCP that programs of the host send to any address, such as that of the router of
the host's network, and they reach nobody else.
The requests of containers are refused.
Searches for UPnP are answered too, except that a search for which the program chooses a device (IP_MULTICAST_IF) is refused.
With
.Cm auto ,
any program of the host may ask for any port of the host.
.Pp
A BIND carries one peer, and viasocks makes the next one as soon as a peer has come.
The proxy chooses the port of each.
dante chooses the port that it was asked for if the port is free.
It is not free while a connection that came to it is open, nor for a minute after dante has closed one first;
dante chooses any other port meanwhile.
At one and the same port dante therefore carries one peer at a time, and
.Nm
asks for the port again as soon as its connection has ended.
If somebody else has the port, it asks again after a second, then less often, and at last every minute.
Each port of the program can have 256 peers by IPv4 at a time, and as many by IPv6.
.Pp
Most other servers do not know BIND.
viasocks logs this once, shows it in
.Cm status ,
and asks them again every ten minutes.
.Pp
With this option the program has a gateway, 198.18.0.2.
The gateway answers NAT-PMP and PCP (RFC 6886, RFC 6887), and UPnP (InternetGatewayDevice:1) at its TCP port 1900.
It also answers searches by multicast, which go no further.
It tells the program at which address and port of the proxy a port of this option is reached, and refuses other ports.
With
.Cm auto ,
the program may ask for any port, up to 32 of them, and viasocks makes BINDs for the TCP ports among them.
With a
.Ar PORT
without
.Li /tcp
or
.Li /udp ,
the program may ask for this port of TCP and of UDP.
By NAT-PMP and PCP the program is told that it has a port for two minutes at most.
It asks again before they are over, and so soon learns of another port at the proxy.
If it does not ask, the port ends: with PCP after this time, and with NAT-PMP after the time for which the program has asked,
but after half an hour at most.
By UPnP the program chooses the port at the proxy and the time.
If the proxy gives another port, the request fails with the error 718, unless the program accepts any port
(AddAnyPortMapping).
UPnP cannot tell the program later that the port at the proxy has changed; the gateway's list of ports shows the present one.
.Pp
Once the program has sent a datagram, it receives datagrams from unknown senders without this option, if the proxy passes them
on.
If the program asks for a UDP port, or with
.Ar PORT Ns Li /udp ,
viasocks makes the association with the proxy before the program sends anything, and keeps it.
.Cm up
refuses
.Ar PORT Ns Li /udp ,
because it knows the address of a program only when the program asks.
A probe finds the address and port from which the proxy sends, and the program is told of them; see
.Fl -stun .
viasocks repeats the probe every minute, and whenever it has made the association again, which changes the port.
.Cm status
says
.Dq filtered
if only those can send to the port to whom the program has sent; such a port is still of use for DHT.
If the proxy uses another port for each destination, the request for a UDP port is refused.
.Pp
BitTorrent expects one number for TCP and UDP.
No proxy lets its client choose the UDP port.
A program that asks for UDP first, by NAT-PMP or PCP, therefore gets the number of UDP for TCP as well, if the proxy has it.
A TCP port that the program has been told stays, because the program has announced it.
The proxy is then asked to listen at the number of UDP too.
By UPnP a request for a UDP port succeeds only by AddAnyPortMapping: Transmission then has TCP only, and libtorrent
(qBittorrent) uses what it gets by NAT-PMP.`,
	},
	{
		Name: "forwarded-port", Arg: "[ADDRESS:]PORT[/tcp|/udp]", Many: true, Live: true, Cmds: Run | Up | Check,
		set:  addForwarded,
		Help: "tell the program, when it asks its gateway, of a port that your provider forwards",
		Man: `Tell the program of
.Ar PORT ,
which the provider of the proxy forwards to you by a way of its own.
The program must ask its gateway by NAT-PMP, PCP or UPnP; see
.Fl -listen .
The first port that it asks for is told to be reached at
.Ar PORT .
.Cm status
shows which port of the program that is.
Without
.Li /tcp
or
.Li /udp
the option is about both.
.Ar ADDRESS
is the IPv4 address at which peers reach the program.
Without it, viasocks asks the proxy by BIND.
If the proxy does not know BIND, no address is told, and PCP is refused.
By UPnP the program must want just this port, so set it in the program if you can.
The option does not concern a port that has a
.Fl -listen
of its own.
.Pp
This option only tells the program; it carries nothing.
The provider's connections arrive where the provider sends them.
If that is this host,
.Fl -publish
.Ar ADDR : Ns Ar PORT : Ns Ar PORT
takes them to the program, which then sees them come from a local address.
Datagrams arrive without
.Fl -publish
if the provider forwards the port to the association of the program at the proxy.`,
	},
	{
		Name: "stun", Arg: "HOST:PORT[,HOST:PORT]", Live: true, Cmds: Run | Up | Check, set: setSTUN,
		Help: "ask these STUN servers at which UDP port peers reach the program",
		Man: `Ask one or two STUN servers (RFC 8489) through the proxy where the datagrams of the program come from.
Peers reach the program by UDP at that address and port.
Without this option, viasocks asks the proxy to send a datagram to this host.
That works only if no NAT is between them and no firewall of this host refuses the datagram, and it finds the address that the
proxy has toward this host.
The option has no effect without
.Fl -listen .
.Pp
viasocks compares the answers of two servers.
If they differ, the proxy uses another port for each destination, no port can be given to others, and requests for a UDP port
are refused.
One server alone cannot show this.
Two ports of one address cannot show it either if the proxy uses another port for each address only, so name two servers with
different addresses.
The same holds without this option, because both questions are then about this host.
The servers see the address of the proxy, and are asked again every minute.
A name as
.Ar HOST
is looked up in the same way as the names that programs ask for.`,
	},
	{
		Name: "on-port", Arg: "COMMAND", Live: true, Cmds: Run | Up | Check, set: setOnPort,
		Help: "run this program whenever a port of --listen is reached at another place",
		Man: `Run the program
.Ar COMMAND
whenever peers reach a port of
.Fl -listen
at another address or port than before.
.Ar COMMAND
is the path of a program without arguments; no shell reads it.
It runs as the user of
.Nm ,
outside of the program's network.
Its input is empty, and its output is discarded.
It has these variables:
VIASOCKS_LISTEN_PORT is the port of the program, VIASOCKS_LISTEN_PROTO is
.Li tcp
or
.Li udp ,
and VIASOCKS_LISTEN_UPSTREAM is the upstream.
VIASOCKS_OUTER_ADDRESS and VIASOCKS_OUTER_PORT say where peers connect by IPv4; VIASOCKS_OUTER_ADDRESS6 and
VIASOCKS_OUTER_PORT6 say the same of IPv6.
They are absent if peers can no longer reach the port.
After ten seconds the command is killed.`,
	},
}

// maxListen is how many times --listen may be given.
const maxListen = 64

// addListen adds a port of --listen.
func addListen(c *Config, v value) error {
	s, err := incoming.Parse(v.text)
	if err != nil {
		return v.err("must be PORT[/tcp|/udp][=UPSTREAM] or auto[=UPSTREAM]: %v", err)
	}
	if slices.ContainsFunc(c.Listen, s.Overlaps) {
		return v.err("it is given twice")
	}
	if len(c.Listen) == maxListen {
		return v.err("more than %d ports", maxListen)
	}
	c.Listen = append(c.Listen, s)
	return nil
}

func addForwarded(c *Config, v value) error {
	f, err := incoming.ParseForwarded(v.text)
	if err != nil {
		return v.err("must be [ADDRESS:]PORT[/tcp|/udp]: %v", err)
	}
	if slices.ContainsFunc(c.Forwarded, f.Overlaps) {
		return v.err("it is given twice")
	}
	if len(c.Forwarded) == maxListen {
		return v.err("more than %d ports", maxListen)
	}
	c.Forwarded = append(c.Forwarded, f)
	return nil
}

func setOnPort(c *Config, v value) (err error) {
	if c.OnPort, err = filepath.Abs(v.text); err != nil || v.text == "" {
		return v.err("must be the path of a program")
	}
	info, err := os.Stat(c.OnPort)
	var path *os.PathError
	if errors.As(err, &path) {
		return v.err("%v: must be the path of a program, without arguments", path.Err)
	} else if !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
		return v.err("%s is no program", c.OnPort)
	}
	return nil
}

// finishListen checks the upstreams that listen.
func (c *Config) finishListen() error {
	for _, s := range c.Listen {
		if c.Command == Up && s.Proto == portmap.UDP {
			return usagef("cannot use --listen %v with up: the program must ask for its UDP port itself, by NAT-PMP or UPnP; "+
				"--listen %d allows that", s, s.Port)
		}
		name := s.Upstream
		if name == "" {
			name = c.Default
		}
		i := slices.IndexFunc(c.Upstreams, func(u Upstream) bool { return u.Name == name })
		switch {
		case name == "":
			return usagef("cannot use --listen %v without --proxy: name the upstream, --listen %[1]v=NAME", s)
		case i < 0:
			return usagef("cannot use --listen %v: there is no upstream %s", s, name)
		}
	}
	if c.OnPort != "" && len(c.Listen) == 0 {
		c.Warnings = append(c.Warnings, "--on-port has no effect without --listen")
	}
	if len(c.STUN) > 0 && len(c.Listen) == 0 {
		c.Warnings = append(c.Warnings, "--stun has no effect without --listen")
	}
	return nil
}
