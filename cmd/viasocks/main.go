// Command viasocks carries every TCP connection and every UDP datagram of one program, or of the whole host, through
// a SOCKS proxy.
package main

import (
	"os"

	"github.com/viasocks/viasocks/cmd/internal/daemon"
	"github.com/viasocks/viasocks/cmd/internal/keeper"
	"github.com/viasocks/viasocks/tun/netns"
)

func main() {
	netns.MainIfChild()
	daemon.MainIfGuardian()
	keeper.MainIfKeeper()
	os.Exit(dispatch(os.Args, os.Environ(), streams{os.Stdin, os.Stdout, os.Stderr}))
}
