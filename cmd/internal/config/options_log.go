package config

import (
	"github.com/viasocks/viasocks/cmd/internal/control"
	"github.com/viasocks/viasocks/route/kernel"
)

// logOptions are the remaining options.
var logOptions = []Option{
	{
		Name: "log-level", Arg: "LEVEL", Live: true, Cmds: all, set: setLogLevel,
		Help: "debug, info, warn or error (run: warn, else info)",
		Man: `.Cm debug , info , warn
or
.Cm error .
At
.Cm info
there is a line for each flow, and at
.Cm debug
one for each question of DNS too: its name and type, how it was answered, the RCODE and the microseconds that it took.
The default is
.Cm warn
for
.Cm run ,
which shares the program's terminal, and
.Cm info
otherwise.`,
	},
	{
		Name: "log-file", Arg: "FILE", Cmds: all, set: setLogFile,
		Help: "append the log to FILE instead of standard error",
		Man:  `Append the log to` + "\n.Ar FILE\n" + `(made with mode 600) instead of writing it to standard error.`,
	},
	{
		Name: "metrics", Arg: "ADDRESS", Cmds: all, set: setMetrics,
		Help: "unix:PATH, ADDRESS:PORT or PORT where Prometheus reads metrics",
		Man: `Serve metrics for Prometheus at
.Li http://ADDRESS:PORT/metrics ,
or at
.Pa /metrics
on a unix socket that only the own user may use.
A port alone is on 127.0.0.1; another address than a loopback address causes a warning, because whoever reaches it can read the
metrics.
With
.Cm run
the address is one of this host, outside of the program's network.
.Pp
There are flows, results of dials and bytes by upstream, replies of SOCKS servers and the time that they take, UDP mappings and
associations, everything that was dropped by its reason, DNS, memory, the delay of the event loops and the version.
No metric has an address or a name of a destination.
A unix socket that is left by a killed viasocks is replaced by the next one, and removed by
.Cm down .`,
	},
	{
		Name: "json", Cmds: Status | Flows | Ps | Doctor | Health, set: boolean(func(c *Config) *bool { return &c.JSON }),
		Help: "print it as JSON, for programs",
		Man:  `Print it as JSON, for programs.`,
	},
	{
		Name: "pid", Arg: "PID", Cmds: Status | Flows | Top | Health | Capture | Attach | Down,
		set:     number(1, maxPID, func(c *Config) *int { return &c.PID }),
		Help:    "ask the viasocks with this process id, see ps",
		Steered: "the network namespace of this process",
		Man: `Ask the viasocks with this process id instead of the one that is up.
.Cm viasocks ps
lists the process ids: those of your own programs under
.Cm run
and of what you have attached to, and for root those of all users.
.Pp
For
.Cm attach
and
.Cm down ,
the id of a process in the network namespace that is meant.`,
	},
	{
		Name: "limit", Arg: "N", Default: "100", Cmds: Flows,
		set:  number(1, control.MaxFlows, func(c *Config) *int { return &c.Limit }),
		Help: "the most flows to list",
		Man:  `How many flows to list at most, ordered by the bytes that they have moved.`,
	},
	{
		Name: "watch", Cmds: Flows, set: boolean(func(c *Config) *bool { return &c.Watch }),
		Help: "print a line whenever something happens to a flow",
		Man: `Print a line whenever a flow is opened, dialled, established or closed, until interrupted, instead of a list.
A flow is
.Em opened
when the proxy is asked for it,
.Em dialled
when the proxy has granted it,
.Em established
when the program is connected (UDP: when the association was made), and
.Em closed
with its state, bytes and duration when it is over; a flow that a rule refuses has only the last line.
With
.Fl -json
each line is a JSON object.
Nothing waits for the reader: if lines are read too slowly, some are lost, and a line tells how many.`,
	},
	{
		Name: "after-service", Cmds: Down, set: boolean(func(c *Config) *bool { return &c.AfterService }),
		Help: "for ExecStopPost of systemd: undo only what fail-open says",
		Man: `For
.Li ExecStopPost
of
.Xr systemd.service 5 :
undo what a failed viasocks has left, if the configuration has
.Fl -fail-open ,
and leave the host closed otherwise.
If another
.Nm
has taken over, nothing is undone.`,
	},
	{
		Name: "state-dir", Arg: "DIR", Default: kernel.DefaultDir,
		Cmds: Up | Attach | Check | Down | Confirm | Status | Flows | Ps | Top | Health |
			Capture | ExcludeProgram | IncludeProgram | Upgrade,
		set:  setStateDir,
		Help: "directory of journal, lock and control socket",
		Man: `The directory for the journal, the lock and the control socket, on a host whose
.Pa /run
cannot be written.
It is made if its parent exists, and only root may have permission to write to it.
It must not survive a reboot.
For
.Cm attach
without root, the default is a directory for this user below
.Ev XDG_RUNTIME_DIR
or
.Pa /run/user .
The same directory must be given to
.Cm close , down , upgrade , status , flows , ps , top
and
.Cm confirm .`,
	},
	{
		Name: fileOption, Arg: "FILE",
		Cmds: all | Down | Confirm | Upgrade | Status | Flows | Ps | Top | Doctor | Health | Capture,
		Help: "read options from FILE; flags win over it",
		Man: `Read options from
.Ar FILE ,
see
.Xr viasocks.conf 5 .
An option given as a flag or in the environment wins over the file; of options that may be given more than once these values then
replace all of the file's.`,
	},
}

// maxPID is the largest process id of Linux (PID_MAX_LIMIT).
const maxPID = 1 << 22
