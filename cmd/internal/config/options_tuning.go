package config

import (
	"strconv"

	"github.com/viasocks/viasocks/socks"
)

// tuningOptions save round trips to the proxy.
var tuningOptions = []Option{
	{
		Name: "pool", Arg: "SIZE", Default: strconv.Itoa(0), Live: true, Cmds: all,
		set:  number(0, socks.MaxPool, func(c *Config) *int { return &c.Tuning.Pool }),
		Help: "connections to each proxy that are kept ready; 0: none",
		Man: `How many connections to each proxy are kept ready, with greeting and login done, from 0 (none) to ` +
			strconv.Itoa(socks.MaxPool) + `.
The number is divided among the threads that carry connections, and rounded up for each.
A new TCP connection of the program then waits for one round trip to the proxy, and not for three or four.
The pool is filled while the program makes connections, two for each, and emptied when it makes none.
A connection that has died is replaced, and the program does not notice: if the proxy ends it in place of an answer, the request
is sent once more, on a new connection.
UDP takes none, nor does Tor with
.Cm isolate .
Each counts as a client of the proxy, which may limit them.`,
	},
	{
		Name: "pool-idle", Arg: "TIME", Default: span(socks.DefaultPoolIdle), Live: true, Cmds: all,
		set:  duration("1s", "1h", func(c *Config) *timeDuration { return &c.Tuning.PoolIdle }),
		Help: "the pool is emptied after this without a new connection",
		Man: `The pool of a proxy is emptied when the program has made no new connection through it for this long, from 1s
to 1h.`,
	},
	{
		Name: "pool-age", Arg: "TIME", Default: span(socks.DefaultPoolAge), Live: true, Cmds: all,
		set:  duration("1s", "1h", func(c *Config) *timeDuration { return &c.Tuning.PoolAge }),
		Help: "connections in the pool that are older are replaced",
		Man: `A connection that has waited in the pool for this long is replaced, from 1s to 1h.
Proxies end connections that send no request; dante does so after 30 seconds.`,
	},
	{
		Name: "pipeline", Arg: "auto|on|off", Default: socks.PipelineOff.String(), Live: true, Cmds: all, set: setPipeline,
		Help: "send greeting, login and request to the proxy at once",
		Man: `Whether greeting, login and request are sent to a SOCKS5 proxy in one write, which saves a round trip for each of
the first two.
Some proxies, such as microsocks, lose what follows their first read, and then do not answer.
.Cm auto
finds out: with the first connection through a proxy, and after another network was found, the proxy is also asked for port 1 of
its own
.Li 127.0.0.1 ,
all in one write.
Only a proxy that answers this is sent everything at once from then on.
.Cm on
does not ask.
Data of the program is never sent before the proxy has granted the request.`,
	},
	{
		Name: "fast-open", Live: true, Cmds: all, set: boolean(func(c *Config) *bool { return &c.Tuning.FastOpen }),
		Help: "use TCP Fast Open toward SOCKS5 proxies",
		Man: `Send the first bytes to a SOCKS5 proxy with the SYN (RFC 7413), which saves a round trip; with
.Fl -pipeline
these are the whole request.
This host's sysctl
.Li net.ipv4.tcp_fastopen
must have bit 1, as it has by default, and the proxy must take it: it then gives a cookie with the first connection.
Elsewhere nothing changes.
It is not used for proxies inside TLS, nor for a name that has several addresses.`,
	},
}

func setPipeline(c *Config, v value) error {
	p, err := socks.ParsePipeline(v.text)
	if err != nil {
		return v.err("%v", err)
	}
	c.Tuning.Pipeline = p
	return nil
}
