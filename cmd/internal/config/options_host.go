package config

import (
	"strconv"

	"github.com/viasocks/viasocks/route/kernel"
)

// hostOptions tell what `up` does to the host.
var hostOptions = []Option{
	{
		Name: "lan", Arg: "direct|carry|refuse", Default: "direct", Soft: true, Live: true, Cmds: Up | Attach | Check,
		set:  setLAN,
		Help: "what becomes of private networks that the host is connected to",
		Man: `How private networks that the host is connected to are reached: those parts of 10/8, 172.16/12, 192.168/16,
169.254/16, fc00::/7 and fe80::/10 that are on one of its devices.
.Cm direct :
without the proxy, except DNS (port 53), which always goes through it;
.Cm carry :
through the proxy, as the proxy sees them;
.Cm refuse :
not at all.
It also holds for private networks on virtual devices (veth, TUN and TAP, dummy, bridge, the parent of a macvlan).
.Pp
.Cm carry
and
.Cm refuse
make an exception only for the networks that this host itself serves, which are still reached directly: those on a bridge whose
ports are all
TAP devices or veths with their peers in other network namespaces, and those on such a veth if the default route of the host
is on a device of another kind.
There is no exception for a device that has a default route or a route with a gateway, or that
.Fl -include-device
or
.Fl -exclude-device
names, nor for a network that
.Fl -include
names, wholly or in part.
With
.Fl -strict
there is no exception at all.
.Cm status ,
the log and
.Fl -dry-run
name these networks and their devices.
What
.Fl -include
names goes through the proxy in all three cases.
To reach a network directly in any case, use
.Fl -exclude .`,
	},
	{
		Name: "inbound", Arg: "keep|carry", Default: "keep", Live: true, Cmds: Up | Attach | Check,
		set:  oneOf(func(c *Config) *string { return &c.Host.Inbound }, "keep", "carry"),
		Help: "what becomes of answers to connections from outside",
		Man: `How answers to connections from outside, such as SSH to this host, leave.
.Cm keep :
they leave directly, by the device through which the connection came, also for connections that were opened before
.Cm up .
A datagram does not prove who sent it.
Therefore a UDP port that has sent a datagram through the proxy of its own accord has no direct answers for an hour, unless
.Fl -inbound-port
names it: see
.Em THE WHOLE HOST
in
.Xr viasocks 7 .
.Cm carry :
they go through the proxy like other traffic, so servers on this host can no longer be reached from outside.`,
	},
	{
		Name: "inbound-port", Arg: "N[-M][,...]", Many: true, Live: true, Cmds: Up | Attach | Check, set: addInboundPorts,
		Help: "UDP ports of servers: answered directly, whatever the port has sent",
		Man: `UDP ports of servers on this host that also speak to others of their own accord, such as WireGuard with the
addresses of its peers, a game server that announces itself, or a resolver that asks from a fixed port.
Datagrams from outside to such a port are answered directly, whatever the port itself has sent before.
Datagrams that the port sends of its own accord still go through the proxy.
.Pp
This has a price.
Anybody can forge the source address of a datagram, and after a forged datagram to such a port, the port's own datagrams to that
address leave without the proxy, until ten minutes after the last of them.
Do not name the port of a program that the proxy must hide, such as that of a DHT node.
.Pp
The option does not apply to ports that are published for containers.
With
.Fl -inbound Cm carry
it applies to datagrams that arrive on a device of
.Fl -exclude-device .`,
	},
	{
		Name: "exclude", Arg: "NETWORK[,...]", Many: true, Live: true, Cmds: Up | Attach | Check,
		set:  addNetworks(func(c *Config) *Selection { return &c.Host.Exclude }),
		Help: "destinations that are reached without the proxy",
		Man: `Destinations that are reached without the proxy: addresses, or networks such as 203.0.113.0/24.
Excluded traffic leaves the host as if there were no
.Nm ,
including DNS questions to such a destination.`,
	},
	{
		Name: "exclude-uid", Arg: "USER|N[-M][,...]", Many: true, Live: true, Cmds: Up | Attach | Check,
		set:  addUIDs(func(c *Config) *Selection { return &c.Host.Exclude }),
		Help: "users whose programs go without the proxy",
		Man: `Users whose programs do not use the proxy, by name or by number.
Their questions of DNS go to the host's own resolvers, too, so that names have their real addresses.
A resolver that runs on this host is not one of their programs: with
.Fl -dns Cm fake
it gives them addresses that stand for names, which they cannot reach.`,
	},
	{
		Name: "exclude-port", Arg: "N[-M][,...]", Many: true, Live: true, Cmds: Up | Attach | Check,
		set:  addPorts(func(c *Config) *Selection { return &c.Host.Exclude }),
		Help: "destination ports (TCP and UDP) that are reached without the proxy",
		Man: `Destination ports, of TCP and UDP, that are reached without the proxy.
Port 53 is not allowed here: names are asked through the proxy.
Traffic to port 65535, for which the kernel takes no ip rule, is refused while the host is closed.`,
	},
	{
		Name: "exclude-device", Arg: "NAME[,...]", Many: true, Live: true, Cmds: Up | Attach | Check,
		set:  addDevices(func(c *Config) *Selection { return &c.Host.Exclude }),
		Help: "devices: what comes in by them, or is bound to them, goes without the proxy",
		Man: `Network devices.
Packets that arrive on one of them and are forwarded, and sockets that are bound to one of them, do not use the proxy.
Connections from outside that arrive on one of them are answered through it, whatever
.Fl -inbound
says.
All other traffic that leaves through such a device is excluded, too: multicast and broadcast for which the program or the kernel
chooses the device, link-local addresses, datagrams of a socket with SO_DONTROUTE to neighbours (IPv4), and traffic that ip
rules of
other programs route there.
The device does not have to exist yet.`,
	},
	{
		Name: "exclude-cgroup", Arg: "PATH[,...]", Many: true, Live: true, Cmds: Up | Attach | Check,
		set:  addCgroups(func(c *Config) *Selection { return &c.Host.Exclude }),
		Help: "control groups whose programs go without the proxy",
		Man: `Control groups (version 2) whose programs do not use the proxy, as in
.Pa /proc/PID/cgroup :
.Li system.slice/chrony.service .
They must exist at the start.`,
	},
	{
		Name: "exclude-unit", Arg: "[USER/]NAME[,...]", Many: true, Live: true, Cmds: Up | Check, set: addUnits,
		Help: "systemd units that go without the proxy, running or not",
		Man: `Units of
.Xr systemd 1
whose processes do not use the proxy: services, scopes, and slices with everything in them.
.Ql .service
may be left out.
.Ql foo@.service
means all instances.
.Ar USER/ ,
by name or number, means a unit of this user's service manager: the user decides what runs there.
The unit does not have to run or to exist: its control group is recognised when it is made, and again after a restart.
A unit of the system counts only in slices, where root alone can make it; a container cannot take its name.
.Pp
What the unit sends before the filter knows it, some milliseconds after its control group was made, goes through the proxy, and
such a connection breaks when the filter knows the unit.
Sockets that systemd has opened for the unit
.Pq Xr systemd.socket 5
belong to systemd and go through the proxy.
Names are asked as with
.Fl -exclude-uid .`,
	},
	{
		Name: "exclude-exe", Arg: "PATH[,...]", Many: true, Live: true, Cmds: Up | Check, set: addExes,
		Help: "programs, by path, that go without the proxy",
		Man: `Programs, by the absolute path of the executable, whose connections and datagrams do not use the proxy.
It is short for
.Ql rule exe PATH direct
before all other rules, and has the limits that
.Xr viasocks.conf 5
names: the program's traffic still passes through
.Nm ,
which opens the connections in its place; only TCP and UDP are carried; a new connection waits until its owner is found; a script
is known by its interpreter; and a program can give itself another path.
For a service use
.Fl -exclude-unit ,
for one run of a program
.Ql viasocks exclude .`,
	},
	{
		Name: "include", Arg: "NETWORK[,...]", Many: true, Live: true, Cmds: Up | Attach | Check,
		set:  addNetworks(func(c *Config) *Selection { return &c.Host.Include }),
		Help: "only these destinations go through the proxy",
		Man: `Only these destinations, and whatever the other options that begin with
.Ql include
name, go through the proxy; everything else leaves the host as if there were no
.Nm .
If something is both included and excluded, it is excluded.`,
	},
	{
		Name: "include-uid", Arg: "USER|N[-M][,...]", Many: true, Live: true, Cmds: Up | Attach | Check,
		set:  addUIDs(func(c *Config) *Selection { return &c.Host.Include }),
		Help: "only these users' programs go through the proxy",
		Man:  `The same for users.`,
	},
	{
		Name: "include-port", Arg: "N[-M][,...]", Many: true, Live: true, Cmds: Up | Attach | Check,
		set:  addPorts(func(c *Config) *Selection { return &c.Host.Include }),
		Help: "only these destination ports go through the proxy",
		Man:  `The same for destination ports.`,
	},
	{
		Name: "include-device", Arg: "NAME[,...]", Many: true, Live: true, Cmds: Up | Attach | Check,
		set:  addDevices(func(c *Config) *Selection { return &c.Host.Include }),
		Help: "only what comes in by these devices goes through the proxy",
		Man:  `The same for devices.`,
	},
	{
		Name: "include-cgroup", Arg: "PATH[,...]", Many: true, Live: true, Cmds: Up | Attach | Check,
		set:  addCgroups(func(c *Config) *Selection { return &c.Host.Include }),
		Help: "only these control groups' programs go through the proxy",
		Man:  `The same for control groups.`,
	},
	{
		Name: "strict", Live: true, Cmds: Up | Attach | Check, set: boolean(func(c *Config) *bool { return &c.Host.Strict }),
		Help: "stop raw frames of AF_PACKET (not of AF_XDP) too, and refuse the LAN",
		Man: `Also stop raw frames of programs with CAP_NET_RAW
.Pq Xr packet 7 ,
which no other filter sees, and refuse the connected private networks, including those of containers and guests, unless they are
carried.
Sockets of type AF_XDP, which also need CAP_NET_RAW, are not stopped, because no filter of the kernel sees their frames.
DHCP clients that send raw frames, as most do for their first lease, must have got their lease before.`,
	},
	{
		Name: "fail-open", Cmds: Up | Check | Down, set: boolean(func(c *Config) *bool { return &c.Host.FailOpen }),
		Help: "restore the host when viasocks fails, instead of leaving it closed",
		Man: `Restore the host if
.Nm
fails or is killed: all its rules are undone.
If the watchdog was killed at the same moment, the filter opens ten seconds later.
If
.Nm
is only stopped, by SIGSTOP or a frozen control group, the filter opens after ten seconds, until it continues.
A proxy that does not answer is not such a failure: traffic to it is refused.
Without this option, the host stays closed after a failure, and nothing leaves it without the proxy, until the next
.Cm up
or
.Cm down .`,
	},
	{
		Name: "stay-closed", Live: true, Cmds: Up | Check | Down,
		set:  boolean(func(c *Config) *bool { return &c.Host.StayClosed }),
		Help: "leave the host closed when viasocks is stopped, until 'viasocks down'",
		Man: `Leave the host closed even when
.Nm
is stopped by a signal, until the next
.Cm up
or
.Cm down .`,
	},
	{
		Name: "wait", Cmds: Up | Check, set: boolean(func(c *Config) *bool { return &c.Host.Wait }),
		Help: "close the host and wait for a proxy that is not there yet",
		Man: `Close the host and wait for a proxy that cannot be resolved or reached yet, or that does not answer, as at boot,
when the network often comes later.
.Nm
tries again after one second, then after two, and so on up to every 30 seconds, and at once when the network
changes; until the proxy works, all traffic to it is refused.
It waits for the proxy of
.Fl -proxy
or, if there is none, for the first one that answers, and not for the others.
.Cm status
says what it waits for.
Without this option,
.Cm up
ends with an error and leaves the host as it was.
A proxy that refuses the login at the first attempt, or that does not speak SOCKS5, is an error even with this option.`,
	},
	{
		Name: "confirm", Arg: "TIME", Cmds: Up | Check,
		set:  duration("5s", "24h", func(c *Config) *timeDuration { return &c.Host.Confirm }),
		Help: "undo everything after this time unless 'viasocks confirm' comes",
		Man: `Undo all changes after this time, from 5s to 24h, unless you run
.Ql viasocks confirm
before: this keeps a host that is reached by SSH reachable.`,
	},
	{
		Name: "takeover", Cmds: Up, set: boolean(func(c *Config) *bool { return &c.Host.Takeover }),
		Help: "take the host over from the viasocks that is up, without a cut connection",
		Man: `Take the host over from the
.Nm
that is up, for instance to start a new version, without cutting a connection and without opening the host for a moment.
New flows belong to the new process.
The old one carries the flows that it has until they end or
.Fl -takeover-limit
is over, and ends then.
The options that name what is on the host
.Pq Fl -tun , Fl -mtu , Fl -offload , Fl -mark , Fl -table , Fl -priority , Fl -nft-table , Fl -fail-open
must be the same, and the same
.Fl -state-dir
is used.
All other options, and the configuration file, may differ.
If the new process cannot start, the old one carries on.
Its proxy is reached only when it has the host: if the proxy does not answer then, a warning says so, and the new process
keeps the host, as it does when a proxy fails later.
For a service of
.Xr systemd 1
use
.Ql viasocks upgrade ,
with which the new process belongs to the service.
If no
.Nm
is up, this is an ordinary start.`,
	},
	{
		Name: "takeover-limit", Arg: "TIME", Default: "1h", Cmds: Up,
		set:  duration("1s", "720h", func(c *Config) *timeDuration { return &c.Host.TakeoverLimit }),
		Help: "how long the viasocks before may keep its flows, with --takeover",
		Man: `How long the
.Nm
from which
.Fl -takeover
takes the host over may keep its flows, from 1s to 720h.
Those that are left then are reset.
A UDP socket counts as a flow for as long as its program has it open.`,
	},
	{
		Name: "dry-run", Cmds: Up, set: boolean(func(c *Config) *bool { return &c.Host.DryRun }),
		Help: "print every rule, route and nftables line, and touch nothing",
		Man: `Print every ip rule, kernel route and nftables line that would be added, in the form in which they could be typed
(except that of
.Fl -fail-open ) ,
and change nothing.`,
	},
	{
		Name: "resolved", Arg: "auto|off", Default: "auto", Live: true, Cmds: Up | Check, set: setResolved,
		Help: "whether systemd-resolved is told to ask viasocks for names",
		Man: `Whether systemd-resolved is told, by D-Bus, to ask
.Nm
for all names.
.Cm auto :
if it runs on this host, except with
.Fl -dns Cm off
and
.Cm relay ,
where it asks the servers that it has.
.Cm off :
never.
See
.Em NAMES
in
.Xr viasocks 7 .`,
	},
	{
		Name: "control-group", Arg: "GROUP", Cmds: Up | Check, set: setControlGroup,
		Help: "group whose members may ask for status and flows, and include programs",
		Man: `Group, by name or number, whose members may ask for
.Cm status
and
.Cm flows ,
and use
.Ql viasocks include .
Without it only root may.`,
	},
	{
		Name: "direct", Arg: "kernel|carry", Default: "kernel", Live: true, Cmds: Up | Check, set: setDirect,
		Help: "who applies rules that let networks and ports out directly",
		Man: `Who lets out what rules with
.Cm direct
match.
.Cm kernel :
the kernel, for rules that name only networks, ports and protocol, if no rule before may decide otherwise about the same
traffic.
Such traffic of programs of this host never reaches
.Nm ,
costs it nothing, and is missing in
.Cm flows
and in all counters;
.Cm status
writes
.Ql kernel
before such rules.
It goes on if
.Nm
is killed, until
.Cm down .
Names that stand for addresses, port 53, multicast, containers, and more than 64 combinations of network, port and protocol
remain with
.Nm ,
and so does everything with
.Fl -decisions
and
.Fl -sniff Cm name .
Connections that are open when a reload adds or removes such a rule end if they would go another way.
.Cm carry :
always
.Nm .`,
	},
	{
		Name: "members-exclude", Cmds: Up | Check, set: boolean(func(c *Config) *bool { return &c.Host.MembersExclude }),
		Help: "let members of --control-group exclude their programs",
		Man: `Let the members of
.Fl -control-group
use
.Ql viasocks exclude ,
too, with which a program leaves the host without the proxy.
Without this option only root may: whoever may exclude a program decides what passes by the proxy.`,
	},
	{
		Name: "tun", Arg: "NAME", Default: kernel.DefaultTUN, Cmds: Up | Attach | Check | Down, set: setTUN,
		Help: "name of the TUN device",
		Man:  `Name of the TUN device, 15 bytes at most.`,
	},
	{
		Name: "mark", Arg: "N[/MASK]", Default: "0x76000000/0xff000000", Cmds: Up | Attach | Check | Down, set: setMark,
		Help: "firewall mark of our own packets",
		Man: `The firewall mark that keeps our own packets off the TUN device, and the mask of its bits.
No other program may use it.`,
	},
	{
		Name: "nft-table", Arg: "NAME", Default: kernel.DefaultNFTable, Cmds: Up | Attach | Check | Down, set: setNFTable,
		Help: "name of the nftables tables to use",
		Man:  `Name of the nftables tables that hold the filter.`,
	},
	{
		Name: "priority", Arg: "N", Default: strconv.Itoa(kernel.DefaultPriority), Cmds: Up | Attach | Check | Down,
		set:  number(1, 32000, func(c *Config) *int { return &c.Host.Priority }),
		Help: "number of the first of our ip rules",
		Man: `Number of the first of our ip rules, from 1 to 32000; 19 more are used.
It must be lower than that of the rule for table main (32766), and should be higher than those of VPNs.`,
	},
	{
		Name: "table", Arg: "N", Default: "30323", Cmds: Up | Attach | Check | Down, set: setTable,
		Help: "number of the kernel routing table to use; the next one is used too",
		Man: `Number of the kernel routing table that leads to the TUN device.
The table with the next number is used, too: it refuses traffic that must not leave the host.
Both must be empty.`,
	},
}
