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
The proxy, or
.Ar UPSTREAM ,
is asked to listen for it by the command BIND, for the same port if it can.
The log,
.Cm status
and
.Fl -on-port
say where peers reach the program then.
The program sees each connection come from the peer's own address.
If it does not listen, the peer's connection is reset.
A program that connects to the endpoint itself, because a tracker has told it of itself, is refused.
.Pp
Once the proxy has shown that it knows BIND, it is asked to listen for IPv6 as well, always for
.Ar PORT
itself, because no gateway could tell a program of another one.
If it cannot,
.Cm status
says so, and it is asked again every ten minutes.
.Pp
With
.Cm up ,
it is a program of this host, which must listen at all addresses of the host, or at the one from which the host's connections
leave; one that is bound to 127.0.0.1 is not reached.
What it answers goes back to the proxy, even if its program, its user or the peer's network is excluded.
This holds for TCP: the datagrams of what is excluded go without the proxy, also those that answer a peer.
A firewall of this host must let the port in on the device of
.Fl -tun ;
if it drops the connection, the peer's connection is reset after 15 seconds.
The setting rp_filter, whatever its value, needs no attention.
A port that docker publishes reaches its container.
Requests by NAT-PMP and PCP to any address, such as that of the router of the host's network, are then answered by
.Nm
and reach nobody else; those of containers are refused.
Searches for UPnP are answered unless a program chooses a device for them (IP_MULTICAST_IF), which is refused.
Any program of the host may ask for any port of the host if
.Cm auto
is given.
.Pp
A BIND carries one peer, and the next one is made as soon as a peer has come.
Which port it gets is the proxy's choice.
dante gives the port that was asked for if it is free, which it is not while a connection that came to it is open, nor for
a minute after dante has closed one first.
Meanwhile it gives any other port.
At one and the same port dante therefore has one peer at a time, and
.Nm
asks for the port again as soon as its connection has ended.
If somebody else has the port, it asks again after a second, then less often, and at last every minute.
Up to 256 peers may be connected to each port of the program by IPv4, and as many by IPv6.
.Pp
Most other servers do not know BIND.
This is logged once and shown by
.Cm status ,
and they are asked again every ten minutes.
With this option the program has a gateway, 198.18.0.2, which answers NAT-PMP and PCP (RFC 6886, RFC 6887), and UPnP
(InternetGatewayDevice:1) at its TCP port 1900.
Searches for it by multicast are answered there and go no further.
It says at which port and address of the proxy a port of this option is reached, and refuses others.
.Cm auto
allows the program to ask for any port, up to 32 of them; a
.Ar PORT
without
.Li /tcp
or
.Li /udp ,
for this port of TCP and UDP.
BINDs are made for those of TCP that it asks for.
By NAT-PMP and PCP a program is told that it has a port for two minutes at most, so that it soon learns of another port at the
proxy by asking again.
If it does not ask, the port ends: with PCP after this time, with NAT-PMP after the time that the program has asked for, at most
half an hour.
By UPnP a program chooses the port at the proxy and the time.
If the proxy gives another port, the request fails with the error 718, unless the program accepts any port
(AddAnyPortMapping).
UPnP cannot tell the program that the port at the proxy has become another one; the list of ports shows the present one.
.Pp
Datagrams from unknown senders are delivered by themselves once the program has sent something, if the proxy passes them on.
If the program asks for a UDP port, or with
.Ar PORT Ns Li /udp ,
its association with the proxy is made before that, and kept.
.Ar PORT Ns Li /udp
is refused with
.Cm up ,
where the address of the program is not known before it asks.
A probe finds the address and port from which the proxy sends, which the program is told; see
.Fl -stun .
It is made again every minute, and whenever the association is made again: the port is then another one.
.Cm status
says
.Dq filtered
if the proxy lets only those send to whom the program has sent; for DHT such a port is still of use.
A proxy that uses another port for each destination is refused.
.Pp
BitTorrent expects one number for TCP and UDP.
No proxy lets the UDP port be chosen.
A program that asks for UDP first, by NAT-PMP or PCP, therefore gets the number of UDP for TCP, too, if the proxy has it.
A port of TCP that the program has been told stays, because the program has announced it; the proxy is then asked to listen
at the number of UDP as well.
By UPnP a request for a UDP port succeeds only by AddAnyPortMapping: Transmission then has TCP only, and libtorrent
(qBittorrent) uses what it gets by NAT-PMP.`,
	},
	{
		Name: "forwarded-port", Arg: "[ADDRESS:]PORT[/tcp|/udp]", Many: true, Live: true, Cmds: Run | Up | Check,
		set:  addForwarded,
		Help: "tell the program, when it asks its gateway, of a port that your provider forwards",
		Man: `Tell the program of
.Ar PORT ,
which the provider of the proxy forwards to you by means of its own.
The first port of the program for which it asks its gateway by NAT-PMP, PCP or UPnP gets it, as the port at which peers
reach it; see
.Fl -listen .
.Cm status
shows which one has it.
Without
.Li /tcp
or
.Li /udp
it is told for both.
.Ar ADDRESS
is the IPv4 address that is told; without it, the proxy is asked by BIND, and if it does not know BIND, no address is told
and PCP is refused.
By UPnP the program must want just this port, so set it in the program if you can.
A port with a
.Fl -listen
of its own is not concerned.
.Pp
This option only tells.
No connection comes through SOCKS by itself: the provider's connections arrive where the provider sends them, and if that
is this host,
.Fl -publish
.Ar ADDR : Ns Ar PORT : Ns Ar PORT
takes them to the program, which then sees them come from a local address.
Datagrams arrive by themselves only if the provider forwards the port to the association of the program at the proxy.`,
	},
	{
		Name: "stun", Arg: "HOST:PORT[,HOST:PORT]", Live: true, Cmds: Run | Up | Check, set: setSTUN,
		Help: "ask these STUN servers at which UDP port peers reach the program",
		Man: `Ask one or two servers of STUN (RFC 8489), through the proxy, where it sends the datagrams of a program from:
at this address and port peers reach the program by UDP.
Without this option the proxy is asked to send a datagram to this host, which works only if there is no NAT between them and
no firewall here refuses it, and which shows the address that the proxy has toward this host.
.Pp
The answers of two servers are compared.
If the proxy uses another port for each destination, no port can be given to others, and requests for a UDP port are refused.
With one server this is not found out.
Nor do two ports of one address show that the proxy uses another port for each address only; name two servers with different
addresses.
The same holds without this option: both questions are then about this host.
The servers see the address of the proxy, and are asked again every minute.
A
.Ar HOST
that is a name is looked up as names of programs are.`,
	},
	{
		Name: "on-port", Arg: "COMMAND", Live: true, Cmds: Run | Up | Check, set: setOnPort,
		Help: "run this program whenever a port of --listen is reached at another place",
		Man: `Run the program
.Ar COMMAND
whenever a port of
.Fl -listen
is reached at another place than before.
It is the path of a program without arguments; no shell reads it.
It runs as the user of
.Nm ,
outside of the program's network, with nothing to read, and its output is discarded.
VIASOCKS_LISTEN_PORT is the port of the program, VIASOCKS_LISTEN_PROTO is
.Li tcp
or
.Li udp ,
VIASOCKS_LISTEN_UPSTREAM names the upstream, and VIASOCKS_OUTER_ADDRESS and VIASOCKS_OUTER_PORT say where peers connect.
The last two are absent if the port can no longer be reached.
VIASOCKS_OUTER_ADDRESS6 and VIASOCKS_OUTER_PORT6 say the same of IPv6.
After ten seconds the command is killed.`,
	},
}

// maxListen is more ports than anybody listens at.
const maxListen = 64

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
