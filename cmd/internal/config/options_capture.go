package config

import (
	"strconv"

	"github.com/viasocks/viasocks/cmd/internal/capture"
	"github.com/viasocks/viasocks/cmd/internal/control"
)

// captureOptions are those of capture alone.
var captureOptions = []Option{
	{
		Name: "flow", Arg: "ID", Cmds: Capture,
		set:  number(1, 1<<53, func(c *Config) *int { return &c.captureFlow }),
		Help: "only the packets of the flow with this number, see flows",
		Man: `Capture only the packets of one flow, by the number that
.Cm flows
shows.`,
	},
	{
		Name: "program", Arg: "NAME|PATH|PID", Cmds: Capture,
		set:  captureText(func(c *control.Capture) *string { return &c.Program }),
		Help: "only the packets of this program",
		Man: `Capture only the packets of one program: the name or the path of its executable, or a process id.
A packet whose program is not known is left out.`,
	},
	{
		Name: "destination", Arg: "DEST", Cmds: Capture,
		set:  captureText(func(c *control.Capture) *string { return &c.Destination }),
		Help: "only this address, network or name, with or without :PORT, or :PORT",
		Man: `Capture only packets to and from one destination:
.Li 203.0.113.5 ,
.Li 203.0.113.0/24 ,
.Li 203.0.113.5:443 ,
.Li :443 ,
or a name such as
.Li example.com ,
which stands for the names below it, too.`,
	},
	{
		Name: "count", Arg: "N", Default: strconv.Itoa(capture.DefaultCount), Cmds: Capture,
		set:  number(1, capture.MaxCount, func(c *Config) *int { return &c.Capture.Count }),
		Help: "end after so many packets",
		Man:  `End the capture after so many packets.`,
	},
	{
		Name: "bytes", Arg: "N", Default: strconv.Itoa(capture.DefaultBytes), Cmds: Capture,
		set:  number(1, capture.MaxBytes, func(c *Config) *int { return &c.captureBytes }),
		Help: "end after so many bytes of packets",
		Man:  `End the capture after so many bytes of packets.`,
	},
	{
		Name: "time", Arg: "TIME", Default: span(capture.DefaultTime), Cmds: Capture,
		set:  duration("1ms", span(capture.MaxTime), func(c *Config) *timeDuration { return &c.Capture.Time }),
		Help: "end after this time",
		Man:  `End the capture after this time.`,
	},
}

func captureText(field func(*control.Capture) *string) func(*Config, value) error {
	return func(c *Config, v value) error {
		if v.text == "" || len(v.text) > capture.MaxText {
			return v.err("must have 1 to %d bytes", capture.MaxText)
		}
		*field(&c.Capture) = v.text
		return nil
	}
}

// setCaptureFile takes the file, which is no option.
func (c *Config) setCaptureFile(args []string) error {
	if len(args) == 0 || args[0] == "" {
		return usagef("cannot capture: no file was given: name one, or - for standard output")
	}
	if len(args) > 1 {
		return usagef("cannot use %q: unexpected argument", args[1])
	}
	c.CaptureFile = args[0]
	c.Capture.Flow, c.Capture.Bytes = uint64(c.captureFlow), int64(c.captureBytes)
	return nil
}
