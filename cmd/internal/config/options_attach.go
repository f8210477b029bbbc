package config

import (
	"regexp"
	"strings"
)

// attachOptions say which network namespace is meant, besides --pid and --netns.
var attachOptions = []Option{
	{
		Name: "container", Arg: "NAME|ID", Cmds: Attach | Down, set: setContainer,
		Help: "the network of this running container, by its name, or by the beginning of its id",
		Man: `The network of a running container, by its name or id, or by the beginning of its id that no other container has.
No engine is asked:
ids are taken from the control groups of the processes
.Pq Pa /proc/PID/cgroup ,
and names from what the engines leave on the host while a container runs.
.Pp
The names of Podman and CRI-O are among the arguments of
.Xr conmon 8 .
After
.Ql podman rename
the earlier name counts until the container starts again.
The names of CRI-O with conmon-rs are not found.
The names of Docker are in its
.Pa config.v2.json ,
and those of Kubernetes and nerdctl are in containerd's
.Pa config.json .
The id of a container of
.Ql ctr
is also its name, with or without the namespace of containerd before it:
.Ar NAMESPACE/ID .
Only root may read the files of Docker and containerd.
The names of rootless Docker are not found.
The name of a container of LXC is in the title of its monitor and in its control group.
The name of a machine of
.Xr systemd-nspawn 1
is in
.Pa /run/systemd/machines .
If systemd-machined does not know the machine, the name is found in the mounts of the machine, which only root may read.
In Kubernetes,
.Ar NAME
may be that of a container, that of its pod, or
.Ar NAMESPACE/POD .
The id of a pod is that of its sandbox, which has a process with containerd, but usually none with CRI-O:
give the name there.
.Pp
If several containers with different networks have the name, viasocks lists them with their ids and takes none.
The id of a container of LXC is its control group.
It prefers a container of the caller or of root to one of another user, who could have chosen the name in order to be taken.
Any other container can be chosen by
.Fl -pid .`,
	},
}

// containerRE matches the name or id of a container, and the name of a pod with or without its namespace before it.
var containerRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,254}(/[A-Za-z0-9][A-Za-z0-9_.-]{0,254})?$`)

func setContainer(c *Config, v value) error {
	if !containerRE.MatchString(v.text) {
		return v.err("must be the name or the id of a container")
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
