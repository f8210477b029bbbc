package config

import (
	"strconv"

	"github.com/viasocks/viasocks/route/kernel"
)

// hostOptions say what `up` does to the host.
var hostOptions = []Option{
	{
		Name: "lan", Arg: "direct|carry|refuse", Default: "direct", Soft: true, Live: true, Cmds: Up | Check, set: setLAN,
		Help: "what becomes of private networks that the host is connected to",
		Man: `What becomes of private networks that the host is connected to: those parts of 10/8, 172.16/12, 192.168/16, 169.254/16,
fc00::/7 and fe80::/10 that are on one of its devices.
.Cm direct :
reached past the proxy, but for names (port 53), which are always asked through it;
.Cm carry :
reached through the proxy, that is seen from there;
.Cm refuse :
not at all.
It also holds for private networks on virtual devices (veth, TUN and TAP, dummy, bridge, the parent of a macvlan).
.Pp
.Cm carry
and
.Cm refuse
spare only the networks that this host itself serves, which are still reached directly: those on a bridge whose ports are all
TAP devices or veths with their peers in other network namespaces, and those on such a veth if the default route of the host
is on a device of another kind.
A device that has a default route or a route with a gateway is not spared, nor is one that
.Fl -include-device
or
.Fl -exclude-device
names, nor a network that
.Fl -include
names, wholly or in part.
.Fl -strict
spares none.
.Cm status ,
the log and
.Fl -dry-run
name these networks and their devices.
What
.Fl -include
names goes through the proxy with each of the three.
To reach a network whatever is said here, use
.Fl -exclude .`,
	},
	{
		Name: "inbound", Arg: "keep|carry", Default: "keep", Live: true, Cmds: Up | Check,
		set:  oneOf(func(c *Config) *string { return &c.Host.Inbound }, "keep", "carry"),
		Help: "what becomes of answers to connections from outside",
		Man: `What becomes of answers to connections that came in from outside, such as SSH to this host.
.Cm keep :
they go back the way they came, also those open before
.Cm up .
A datagram proves nothing about who sent it, so a UDP port that has sent something through the proxy of its own accord has no
direct answers for an hour, unless
.Fl -inbound-port
names it: see
.Sx THE WHOLE HOST .
.Cm carry :
they are nothing special, so a server on this host can't be reached from outside any more.`,
	},
	{
		Name: "inbound-port", Arg: "N[-M][,...]", Many: true, Live: true, Cmds: Up | Check, set: addInboundPorts,
		Help: "UDP ports of servers: answered directly, whatever the port has sent",
		Man: `UDP ports of servers on this host that also speak to others of their own accord, such as WireGuard with the addresses of
its peers, a game server that announces itself, or a resolver that asks from a fixed port.
What comes in to such a port from outside is answered directly, whatever the port itself has sent before.
What the port sends of its own accord still goes through the proxy.
.Pp
This gives something up.
Anybody can forge the sender of a datagram, and a forged datagram to such a port makes the port's own datagrams to that
address leave directly, past the proxy, until ten minutes after the last of them.
Do not name the port of a program that is to be hidden behind the proxy, such as that of a DHT node.
.Pp
The option is not for ports that are published for containers.
With
.Fl -inbound Cm carry
it holds for what comes in by a device of
.Fl -exclude-device .`,
	},
	{
		Name: "exclude", Arg: "NETWORK[,...]", Many: true, Live: true, Cmds: Up | Check,
		set:  addNetworks(func(c *Config) *Selection { return &c.Host.Exclude }),
		Help: "destinations that are reached past the proxy",
		Man: `Destinations that are reached past the proxy: addresses, or networks like 203.0.113.0/24.
What is excluded leaves the host as if there were no
.Nm ,
questions for names to such a destination included.`,
	},
	{
		Name: "exclude-uid", Arg: "USER|N[-M][,...]", Many: true, Live: true, Cmds: Up | Check,
		set:  addUIDs(func(c *Config) *Selection { return &c.Host.Exclude }),
		Help: "users whose programs go past the proxy",
		Man:  `Users whose programs go past the proxy, by name or by number.`,
	},
	{
		Name: "exclude-port", Arg: "N[-M][,...]", Many: true, Live: true, Cmds: Up | Check,
		set:  addPorts(func(c *Config) *Selection { return &c.Host.Exclude }),
		Help: "destination ports (TCP and UDP) that are reached past the proxy",
		Man: `Destination ports, of TCP and UDP, that are reached past the proxy.
Not 53: names are asked through it.`,
	},
	{
		Name: "exclude-device", Arg: "NAME[,...]", Many: true, Live: true, Cmds: Up | Check,
		set:  addDevices(func(c *Config) *Selection { return &c.Host.Exclude }),
		Help: "devices: what comes in by them, or is bound to them, goes past the proxy",
		Man: `Network devices: what comes in by one of them to be forwarded, and sockets that are bound to one of them, go past the
proxy.
Connections from outside that come in by one of them are answered by it, whatever
.Fl -inbound
says.
So does what leaves by it, whatever is asked of
.Nm :
multicast and broadcast for which the program or the kernel chooses the device, link-local addresses, datagrams to
neighbours by a socket with SO_DONTROUTE (IPv4), and what rules of others lead there.
The device need not be there yet.`,
	},
	{
		Name: "exclude-cgroup", Arg: "PATH[,...]", Many: true, Live: true, Cmds: Up | Check,
		set:  addCgroups(func(c *Config) *Selection { return &c.Host.Exclude }),
		Help: "control groups whose programs go past the proxy",
		Man: `Control groups (version 2) whose programs go past the proxy, as in
.Pa /proc/PID/cgroup :
.Li system.slice/chrony.service .
They must be there at the start.`,
	},
	{
		Name: "include", Arg: "NETWORK[,...]", Many: true, Live: true, Cmds: Up | Check,
		set:  addNetworks(func(c *Config) *Selection { return &c.Host.Include }),
		Help: "only these destinations go through the proxy",
		Man: `Only these destinations go through the proxy, and what the other options that begin with
.Ql include
name; everything else leaves the host as if there were no
.Nm .
What is excluded as well is excluded.`,
	},
	{
		Name: "include-uid", Arg: "USER|N[-M][,...]", Many: true, Live: true, Cmds: Up | Check,
		set:  addUIDs(func(c *Config) *Selection { return &c.Host.Include }),
		Help: "only these users' programs go through the proxy",
		Man:  `The same for users.`,
	},
	{
		Name: "include-port", Arg: "N[-M][,...]", Many: true, Live: true, Cmds: Up | Check,
		set:  addPorts(func(c *Config) *Selection { return &c.Host.Include }),
		Help: "only these destination ports go through the proxy",
		Man:  `The same for destination ports.`,
	},
	{
		Name: "include-device", Arg: "NAME[,...]", Many: true, Live: true, Cmds: Up | Check,
		set:  addDevices(func(c *Config) *Selection { return &c.Host.Include }),
		Help: "only what comes in by these devices goes through the proxy",
		Man:  `The same for devices.`,
	},
	{
		Name: "include-cgroup", Arg: "PATH[,...]", Many: true, Live: true, Cmds: Up | Check,
		set:  addCgroups(func(c *Config) *Selection { return &c.Host.Include }),
		Help: "only these control groups' programs go through the proxy",
		Man:  `The same for control groups.`,
	},
	{
		Name: "strict", Live: true, Cmds: Up | Check, set: boolean(func(c *Config) *bool { return &c.Host.Strict }),
		Help: "stop raw frames of AF_PACKET (not of AF_XDP) too, and refuse the LAN",
		Man: `Stop also what programs with CAP_NET_RAW send as raw frames
.Pq Xr packet 7 ,
which no other filter sees, and refuse the connected private networks unless they are carried, those of containers and guests
included.
Sockets of type AF_XDP are not stopped: no filter of the kernel sees what they send.
They need CAP_NET_RAW too.
DHCP clients that send raw frames, as most do for their first lease, need the answer they have.`,
	},
	{
		Name: "fail-open", Cmds: Up | Check | Down, set: boolean(func(c *Config) *bool { return &c.Host.FailOpen }),
		Help: "restore the host when viasocks fails, instead of leaving it closed",
		Man: `Give the host back when
.Nm
fails or is killed, that is all its rules are undone.
Where it could not be told even so, because what watches over it was killed at the same moment, the filter opens ten
seconds later.
The same happens while
.Nm
is only stopped, by SIGSTOP or a frozen control group: after ten seconds the filter opens until it goes on.
A proxy that does not answer is no such failure: what would go through it is refused.
Without it the host stays closed then, so that nothing leaves past the proxy, until the next
.Cm up
or
.Cm down .`,
	},
	{
		Name: "stay-closed", Live: true, Cmds: Up | Check | Down,
		set:  boolean(func(c *Config) *bool { return &c.Host.StayClosed }),
		Help: "leave the host closed when viasocks is stopped, until 'viasocks down'",
		Man: `Leave the host closed when
.Nm
is stopped by a signal too, until the next
.Cm up
or
.Cm down .`,
	},
	{
		Name: "wait", Cmds: Up | Check, set: boolean(func(c *Config) *bool { return &c.Host.Wait }),
		Help: "close the host and wait for a proxy that is not there yet",
		Man: `Close the host and wait for a proxy that cannot be found or reached yet, or that does not answer, as at boot, when the
network often comes later.
It is looked for again after one second, then after two, and so on up to every 30 seconds, and at once when the network
changes; until it is there, everything that would go through it is refused.
.Cm status
says what is waited for.
Without this option
.Cm up
ends with an error, and the host is as it was.
A proxy that refuses the login at the first look, or that does not speak SOCKS5, is an error with this option too.`,
	},
	{
		Name: "confirm", Arg: "TIME", Cmds: Up | Check, set: duration("5s", "24h", func(c *Config) *timeDuration { return &c.Host.Confirm }),
		Help: "undo everything after this time unless 'viasocks confirm' comes",
		Man: `Undo everything after this time, from 5s to 24h, unless
.Ql viasocks confirm
comes: for those who sit at the far end of an SSH session.`,
	},
	{
		Name: "dry-run", Cmds: Up, set: boolean(func(c *Config) *bool { return &c.Host.DryRun }),
		Help: "print every rule, route and nftables line, and touch nothing",
		Man: `Print every ip rule, kernel route and nftables line that there would be, as they could be typed but for that of
.Fl -fail-open ,
and touch nothing.`,
	},
	{
		Name: "control-group", Arg: "GROUP", Cmds: Up | Check, set: setControlGroup,
		Help: "group whose members may ask for status and flows",
		Man: `Group, by name or number, whose members may ask for
.Cm status
and
.Cm flows .
Without it only root may.`,
	},
	{
		Name: "tun", Arg: "NAME", Default: kernel.DefaultTUN, Cmds: Up | Check | Down, set: setTUN,
		Help: "name of the TUN device",
		Man:  `Name of the TUN device, 15 bytes at most.`,
	},
	{
		Name: "mark", Arg: "N[/MASK]", Default: "0x76000000/0xff000000", Cmds: Up | Check | Down, set: setMark,
		Help: "firewall mark of our own packets",
		Man: `The firewall mark that keeps our own packets off the TUN device, and the bits of it that count.
It must be nobody else's.`,
	},
	{
		Name: "nft-table", Arg: "NAME", Default: kernel.DefaultNFTable, Cmds: Up | Check | Down, set: setNFTable,
		Help: "name of the nftables tables to use",
		Man:  `Name of the nftables tables that hold the filter.`,
	},
	{
		Name: "priority", Arg: "N", Default: strconv.Itoa(kernel.DefaultPriority), Cmds: Up | Check | Down,
		set:  number(1, 32000, func(c *Config) *int { return &c.Host.Priority }),
		Help: "number of the first of our ip rules",
		Man: `Number of the first of our ip rules, from 1 to 32000; 19 more are used.
It must be before the kernel's own (32766), and should be behind those of VPNs.`,
	},
	{
		Name: "table", Arg: "N", Default: "30323", Cmds: Up | Check | Down, set: setTable,
		Help: "number of the kernel routing table to use; the next one is used too",
		Man: `Number of the kernel routing table that leads to the TUN device.
The table with the next number is used too: it refuses what must not leave the host.
Both must be empty.`,
	},
}
