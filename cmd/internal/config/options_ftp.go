package config

import (
	"slices"
	"strconv"
	"strings"
)

// ftpOptions are about FTP servers that connect to their client.
var ftpOptions = []Option{
	{
		Name: "ftp-active", Arg: "PORT[,...]", Live: true, Cmds: Run | Up | Check, set: setFTPActive,
		Help: "make active FTP (PORT, EPRT) work with servers at these ports, by BIND",
		Man: `Make active FTP work with servers whose control connections are at these ports, usually 21.
In active FTP the server connects to the program for each file and list, and the program says by the commands PORT or EPRT
where it listens.
It names an address that the server cannot reach, or must not know.
With this option the proxy that carries the control connection is asked to listen for the server by the command BIND,
the program's command is rewritten to say where the proxy listens, and
the server's connection is passed on to the program.
The program sees it come from the server.
.Pp
Programs that use PASV or EPSV, as nearly all do by default, do not need this option.
.Pp
If the proxy does not listen, which most servers other than dante never do, the program's command is passed on without
its argument.
The FTP server refuses that with 500 or 501, and most programs use PASV then.
The same happens while 256 such requests wait.
The log at level
.Cm info
says why.
An upstream with several proxies must send all connections to one server by one of them, because the FTP server lets only
the address in from which the control connection comes:
.Ql select=ordered
does, and
.Ql select=round-robin
does not.
.Pp
Only commands that name an address of the program and a port of 1024 or more are rewritten, in lines of up to 512 bytes;
everything else passes unchanged, so that a program can have two servers exchange a file.
Once the program speaks TLS (AUTH TLS), its commands cannot be read, and active FTP does not work.
Whatever the program connects to at these ports can have one of its own ports named in this way, and only that server can
connect to it then.
A proxy waits for the server for five minutes, or until the program sends the next command of this kind or ends its control
connection.`,
	},
}

// maxFTPPorts is more ports than FTP servers have.
const maxFTPPorts = 64

func setFTPActive(c *Config, v value) error {
	c.FTPActive = nil
	for s := range strings.SplitSeq(v.text, ",") {
		n, err := strconv.ParseUint(s, 10, 16)
		if err != nil || n == 0 || n == 53 {
			return v.err("%q is no port of an FTP server: 1 to 65535, and not 53", s)
		}
		if !slices.Contains(c.FTPActive, uint16(n)) {
			c.FTPActive = append(c.FTPActive, uint16(n))
		}
	}
	if len(c.FTPActive) > maxFTPPorts {
		return v.err("more than %d ports", maxFTPPorts)
	}
	return nil
}
