// Command bench is what scripts/bench.sh measures with: a far end, a fast SOCKS5 server, and a load generator that
// does the same work natively (it speaks SOCKS5 itself) and plainly (through a TUN, or directly).
//
//	bench world --listen 203.0.113.10:9000            the far end, TCP and UDP on one port
//	bench socks --listen 10.0.0.1:1080                the SOCKS5 server: CONNECT and BIND by splice, UDP ASSOCIATE
//	bench link  --a … --b … --delay 25ms              a slow or lossy link between two namespaces
//	bench push  --connections 8                       sends to the published port of P1 and P8, or is the peers of BD8
//	bench table                                       results of load on standard input, as a table
//	bench modes --to off                              the same with an interval for each mode, for scripts/seecost.sh
//	bench load  --case D1 --target … [--proxy …]      one case: one line of JSON on standard output
//
// With socks --names ADDRESS and load --under DOMAIN, scripts/dnsbench.sh has connections made by name.
//
// scripts/bench.sh runs them in namespaces of its own: sudo scripts/bench.sh --rounds 1 --time 1s --cases 'scan churn'. Its help
// says what may stand before a case's name. The cases:
//
//	D1 D8 U1 U8 both       bulk: downloads, uploads, one of each
//	P1 P8                  bytes into the program by its published port, on one connection and on eight; natively, by
//	                       loopback
//	BD1 BD8 BU1 BU8        as D1 to U8, on connections that peers beyond the proxy opened by BIND
//	conn conn1             new connections of 64 clients, of one
//	ping1 ping16 pingbulk  round trips on one connection, on 16, on one beside eight downloads
//	udp64 udp1200 udp500   round trips of 8 sockets, of 500
//	udpnew                 new sockets, one question each
//	peers2000              one socket that asks 2,000 peers
//	floodup flooddown      as many datagrams as go, one way
//	pingflood              twenty sockets that ask beside a flood
//	idle2000 idle9500      memory of connections that do nothing
//	scan                   20,000 addresses tried once each, 256 at a time: an eighth is open, an eighth silent, the others
//	                       refuse. The CPU time is for each attempt. Meanwhile: new connections and round trips, 100 of
//	                       each in a second
//	churn                  500 connections of 1 KB in a second beside a download. The CPU time is for each connection: what the
//	                       bytes would not have cost without them. Meanwhile: the download's rate, with and without them
//
// The generator and both servers do no work on the bytes, so that neither is the limit of what is measured.
package main

import (
	"fmt"
	"os"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: bench world|socks|load|link|push|table|modes [flags]")
		os.Exit(2)
	}
	var err error
	switch os.Args[1] {
	case "world":
		err = worldMain(os.Args[2:])
	case "socks":
		err = socksMain(os.Args[2:])
	case "link":
		err = linkMain(os.Args[2:])
	case "push":
		err = pushMain(os.Args[2:])
	case "table":
		err = table(os.Stdin, os.Stdout)
	case "modes":
		err = modesMain(os.Args[2:], os.Stdin, os.Stdout)
	case "load":
		err = loadMain(os.Args[2:])
	default:
		err = fmt.Errorf("no command %q: world, socks, load, link, push, table or modes", os.Args[1])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}
