package config

import (
	"bufio"
	"os"
	"os/user"
	"strconv"
	"strings"
)

// runAsOptions say as whom, and where, root runs a program.
var runAsOptions = []Option{
	{
		Name: "user", Arg: "NAME|UID[:GROUP]", Cmds: Run | Check, set: setRunAs,
		Help: "run the program as this user; only root can",
		Man: `Run the program as another user, which only root can do.
.Nm
itself stays root: files, unix sockets and the control socket that it makes belong to root.
.Pp
As with
.Xr su 1 ,
the program has the user's primary and supplementary groups, no capabilities, and the variables
.Ev HOME , SHELL , USER
and
.Ev LOGNAME
of this user; the other variables and the directory stay.
.Ev XDG_RUNTIME_DIR ,
which is a directory of the caller, is removed.
With
.Ar GROUP ,
a name or a number, the program has this group alone.
A
.Ar UID
that no user of
.Pa /etc/passwd
has needs a
.Ar GROUP ;
its
.Ev HOME
is
.Pa / .`,
	},
	{
		Name: "netns", Arg: "NAME", Cmds: Run | Attach | Down | Check, set: setNetNS,
		Help: "use a network namespace made by 'ip netns add NAME'; run: only root can",
		Man: `Run the program in the network namespace
.Ar NAME
of
.Xr ip-netns 8
instead of a new one, which only root can do.
Programs that others start there by
.Ql ip netns exec
then use the proxy as well, but their
.Pa /etc/resolv.conf
must name a server that the proxy can reach, or 198.18.0.2.
.Pp
The namespace must have no network device besides
.Li lo
that is up, because the program could use it to avoid the proxy; otherwise nothing is started.
One
.Nm
at a time can use it.
At the end it is left as it was: the TUN with its addresses and routes disappears, and
.Li lo
and the settings of the kernel are restored.
A process called
.Ql viasocks-restore
does this even if
.Nm
is killed.
If only this process is killed, another one takes its place.
If both are killed at the same moment, the TUN disappears, and
.Li lo
and those settings stay as
.Nm
has set them.
.Pp
For
.Cm attach
and
.Cm down ,
the network namespace that is meant, whatever devices it has.`,
	},
}

// RunAs is the user as whom the program runs.
type RunAs struct {
	UID, GID          int
	Groups            []int
	Name, Home, Shell string // Name is empty for a number that no user has
}

func setNetNS(c *Config, v value) error {
	if v.text == "" || v.text == "." || v.text == ".." || strings.Contains(v.text, "/") {
		return v.err("must be a name that 'ip netns list' shows")
	}
	c.NetNS = v.text
	return nil
}

func setRunAs(c *Config, v value) error {
	name, group, hasGroup := strings.Cut(v.text, ":")
	r, err := lookUpUser(name)
	if err != nil {
		return v.err("%v", err)
	}
	if r == nil { // a number without a user
		uid, err := strconv.ParseUint(name, 10, 31)
		switch {
		case err != nil:
			return v.err("there is no user %q", name)
		case !hasGroup:
			return v.err("there is no user %s: give its group as well, as in %[1]s:%[1]s", name)
		}
		r = &RunAs{UID: int(uid), Home: "/", Shell: "/bin/sh"}
	}
	if hasGroup {
		if g, err := user.LookupGroup(group); err == nil {
			group = g.Gid
		}
		gid, err := strconv.ParseUint(group, 10, 31)
		if err != nil {
			return v.err("there is no group %q", group)
		}
		r.GID, r.Groups = int(gid), []int{int(gid)}
	}
	c.RunAs = r
	return nil
}

// lookUpUser finds a user by name or number, with all groups. It returns nil if there is none.
func lookUpUser(name string) (*RunAs, error) {
	u, err := user.Lookup(name)
	if err != nil {
		if u, err = user.LookupId(name); err != nil {
			return nil, nil
		}
	}
	r := &RunAs{Name: u.Username, Home: u.HomeDir, Shell: shellOf(u.Username)}
	if r.UID, err = strconv.Atoi(u.Uid); err != nil {
		return nil, err
	}
	if r.GID, err = strconv.Atoi(u.Gid); err != nil {
		return nil, err
	}
	groups, err := u.GroupIds()
	if err != nil {
		return nil, err
	}
	for _, g := range groups {
		n, err := strconv.Atoi(g)
		if err != nil {
			return nil, err
		}
		r.Groups = append(r.Groups, n)
	}
	return r, nil
}

// shellOf returns the shell of a user (passwd(5)).
func shellOf(name string) string {
	const none = "/bin/sh"
	f, err := os.Open("/etc/passwd")
	if err != nil {
		return none
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if fields := strings.Split(s.Text(), ":"); len(fields) == 7 && fields[0] == name && fields[6] != "" {
			return fields[6]
		}
	}
	return none
}
