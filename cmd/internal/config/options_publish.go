package config

import (
	"path/filepath"

	"github.com/viasocks/viasocks/cmd/internal/publish"
)

// publishOptions say which ports of a program in its own namespace can be reached from outside.
var publishOptions = []Option{
	{
		Name: "publish", Arg: "[ADDR:]PORT[:PORT][/udp]", Many: true, Cmds: Run | Check,
		set:  addPublish("must be [ADDR:]PORT[:PORT][/udp], such as 6800 or 0.0.0.0:8080:80", publish.Parse),
		Help: "make a port of the program reachable, at 127.0.0.1 or at ADDR of this host",
		Man: `Make a port on which the program listens reachable from outside of its network namespace.
The first
.Ar PORT
is the one of this host; 0 stands for any that is free, and the log at level
.Cm info
says which one it is.
The second one is the port of the program, if it has another number.
.Ar ADDR
is the address of this host at which the port is reached, an IPv6 address in brackets.
The default is 127.0.0.1, so that only programs of this host reach it;
0.0.0.0 makes it reachable from everywhere.
A port below 1024 needs the right to use it, as for any other program.
.Pp
The program may listen at all of its addresses or only at its 127.0.0.1 or ::1.
It sees connections from 198.18.0.3 or fd76:6961:736f:636b::3, whoever makes them, so that a program which lets
only 127.0.0.1 in must be told to let this address in, too.
What the program answers takes the same way back and does not pass the proxy.
A connection that comes before the program listens is reset.
1,024 connections, and as many senders of datagrams, are carried at a time for each port; a sender of datagrams is forgotten
two minutes after the last one.`,
	},
	{
		Name: "publish-unix", Arg: "PATH:PORT", Many: true, Cmds: Run | Check,
		set:  addPublish("must be PATH:PORT", parsePublishUnix),
		Help: "make a TCP port of the program reachable by a unix socket",
		Man: `Make a TCP port of the program reachable by a unix socket that only the user of
.Nm
may use.
The socket is removed at the end.
A socket that is there already is replaced if nobody listens at it; any other file is left alone, and nothing is started.`,
	},
}

// maxPublished is more ports than anybody publishes.
const maxPublished = 256

func addPublish(form string, parse func(string) (publish.Spec, error)) func(*Config, value) error {
	return func(c *Config, v value) error {
		s, err := parse(v.text)
		if err != nil {
			return v.err("%s: %v", form, err)
		}
		if len(c.Publish) == maxPublished {
			return v.err("more than %d ports", maxPublished)
		}
		c.Publish = append(c.Publish, s)
		return nil
	}
}

// parsePublishUnix makes the path absolute: messages name it.
func parsePublishUnix(text string) (publish.Spec, error) {
	s, err := publish.ParseUnix(text)
	if err == nil {
		s.Path, err = filepath.Abs(s.Path)
	}
	return s, err
}
