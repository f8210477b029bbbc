// Command bench is what scripts/bench.sh measures with: a far end, a fast SOCKS5 server, and a load generator that
// does the same work natively (it speaks SOCKS5 itself) and plainly (through a TUN, or directly).
//
//	bench world --listen 203.0.113.10:9000            the far end, TCP and UDP on one port
//	bench socks --listen 10.0.0.1:1080                the SOCKS5 server: CONNECT by splice, UDP ASSOCIATE by mmsg
//	bench link  --a … --b … --delay 25ms              a slow or lossy link between two namespaces
//	bench table                                       results of load on standard input, as a table
//	bench load  --case D1 --target … [--proxy …]      one case: one line of JSON on standard output
//
// The generator and both servers do no work on the bytes, so that neither is the limit of what is measured.
package main

import (
	"fmt"
	"os"
)

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: bench world|socks|load|link|table [flags]")
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
	case "table":
		err = table(os.Stdin, os.Stdout)
	case "load":
		err = loadMain(os.Args[2:])
	default:
		err = fmt.Errorf("no command %q: world, socks, load, link or table", os.Args[1])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}
