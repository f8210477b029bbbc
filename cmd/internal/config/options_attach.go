package config

import (
	"regexp"
	"strings"
)

// attachOptions say which network namespace is meant, besides --pid and --netns.
var attachOptions = []Option{
	{
		Name: "container", Arg: "ID", Cmds: Attach | Down, set: setContainer,
		Help: "the network of this running container, by the beginning of its id",
		Man: `The network of a running container of Docker, Podman, containerd or CRI-O, by its id or the beginning of it
that no other container has, or of an LXC container by its name.
The ids are taken from the control groups of the processes
.Pq Pa /proc/PID/cgroup ,
so that no engine is asked.
The names of the other engines are not found there;
.Ql docker ps
and
.Ql podman ps
show the ids.
A container without a control group of its own must be named by
.Fl -pid .`,
	},
}

var containerRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,254}$`)

func setContainer(c *Config, v value) error {
	if !containerRE.MatchString(v.text) {
		return v.err("must be the id of a container, or the name of one of LXC")
	}
	c.Container = v.text
	return nil
}

// checkTarget checks that a command about a network namespace names one.
func (c *Config) checkTarget() error {
	var given []string
	if c.PID != 0 {
		given = append(given, "--pid")
	}
	if c.NetNS != "" {
		given = append(given, "--netns")
	}
	if c.Container != "" {
		given = append(given, "--container")
	}
	switch {
	case c.Command == Attach && len(given) == 0:
		return usagef("cannot attach: no network namespace was given: name it with --pid, --netns or --container")
	case c.Command&(Attach|Down) != 0 && len(given) > 1:
		return usagef("cannot use %s together: each names a network namespace", strings.Join(given, " and "))
	}
	return nil
}

// HasTarget reports whether a network namespace was named.
func (c *Config) HasTarget() bool { return c.PID != 0 || c.NetNS != "" || c.Container != "" }
