package config

import (
	"errors"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

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
A port of this host below 1024 needs the right to use it, as for any other program; in its own network the program may
listen on every port.
.Pp
The program may listen at all of its addresses or only at its 127.0.0.1 or ::1.
It sees connections from 198.18.0.3 or fd76:6961:736f:636b::3, whoever makes them, so that a program which lets
only 127.0.0.1 in must be told to let this address in, too.
What the program answers takes the same way back and does not pass the proxy.
A connection that comes before the program listens is reset.
1,024 connections, and as many senders of datagrams, are carried at a time for each port.
A sender of datagrams is forgotten two minutes after its last one.
A sender that the program has not answered may be forgotten before that, to make room for another.
The program's side of each connection is opened by a process called
.Ql viasocks-sockets .
If it is killed, connections that exist stay, and another one is started: at once the first time, then with pauses of a quarter of
a second to 30 seconds, in which new connections are reset.
Without root this needs
.Xr nsenter 1 .`,
	},
	{
		Name: "publish-unix", Arg: "PATH:PORT", Many: true, Cmds: Run | Check,
		set:  addPublish("must be PATH:PORT, such as /run/web:8080", parsePublishUnix),
		Help: "make a TCP port of the program reachable by a unix socket",
		Man: `Make a TCP port of the program reachable by a unix socket that only the user of
.Nm
may use.
The socket is removed at the end.
A socket that is there already is replaced if nobody listens at it; any other file is left alone, and nothing is started.`,
	},
}

// instanceOptions tell a program under run from others.
var instanceOptions = []Option{
	{
		Name: "name", Arg: "NAME", Cmds: Run | Attach | Check, set: setName,
		Help: "a name for this instance, for ps and exec",
		Man: `A name for this instance, which
.Cm ps
shows and
.Cm exec
takes in place of the process id.
It consists of up to 64 letters, digits, dots, hyphens and underscores and does not begin with a digit.`,
	},
	{
		Name: "pid-file", Arg: "FILE", Cmds: Run | Attach | Check, set: setPIDFile,
		Help: "write the process id of viasocks to FILE",
		Man: `Write the process id of
.Nm
to
.Ar FILE
once the program has its network.
A signal that is sent to
.Nm
reaches the program.
The file is removed at the end.
It replaces a regular file of this name.
If the name is that of a link, a device or anything else, that is left alone and the start fails.`,
	},
	{
		Name: "ready-fd", Arg: "N", Default: "-1", Cmds: Run | Attach | Check,
		set:  number(-1, maxFD, func(c *Config) *int { return &c.ReadyFD }),
		Help: "write a line to this file descriptor once the program has its network",
		Man: `Write
.Li READY
and a line feed to the file descriptor
.Ar N ,
which the caller has opened, and close it.
This happens once the program has its network and its published ports listen.
The program does not get the descriptor.`,
	},
}

// maxFD is the largest number that a file descriptor can have.
const maxFD = 1<<31 - 1

// maxName is the length of a name in bytes.
const maxName = 64

func setName(c *Config, v value) error {
	if !isName(v.text) {
		return v.err("must be up to %d letters, digits, dots, hyphens and underscores, and must not begin with a digit", maxName)
	}
	c.Name = v.text
	return nil
}

// isName reports whether s can be the name of an instance. A name is never a process id.
func isName(s string) bool {
	if s == "" || len(s) > maxName || s[0] >= '0' && s[0] <= '9' || s[0] == '-' {
		return false
	}
	for _, r := range s {
		if r > 'z' || !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._-", r)) {
			return false
		}
	}
	return true
}

func setPIDFile(c *Config, v value) (err error) {
	if v.text == "" {
		return v.err("must be the name of a file")
	}
	if c.PIDFile, err = filepath.Abs(v.text); err != nil {
		return v.err("%v", err)
	}
	return nil
}

// takeInstance takes the first word of exec from the program.
func (c *Config) takeInstance() error {
	if len(c.Program) == 0 {
		return usagef("cannot exec: no name or process id of a viasocks was given")
	}
	c.Instance, c.Program = c.Program[0], c.Program[1:]
	if n, err := strconv.Atoi(c.Instance); !isName(c.Instance) && (err != nil || n < 1 || n > maxPID) {
		return usagef("cannot exec in %q: must be a name or a process id that 'viasocks ps' shows", c.Instance)
	}
	if len(c.Program) > 0 && c.Program[0] == "--" {
		c.Program = c.Program[1:]
	}
	return nil
}

// maxPublished is more ports than anybody publishes.
const maxPublished = 256

func addPublish(form string, parse func(string) (publish.Spec, error)) func(*Config, value) error {
	return func(c *Config, v value) error {
		s, err := parse(v.text)
		if errors.Is(err, publish.ErrForm) {
			return v.err("%s", form)
		}
		if err != nil {
			return v.err("%s: %v", form, err)
		}
		if slices.ContainsFunc(c.Publish, s.Overlaps) {
			return v.err("another port of the program is published there, too")
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
