#!/bin/bash
#
# Question: does Go's resolver keep the zone of a link-local address?
#
# Why it matters: a proxy or a name server may have an address such as fe80::1%eth0. A program that gives it to LookupNetIP, as it
# does with names, gets fe80::1 and no error. A connection to that address fails ("invalid argument"), or takes the wrong link.
# LookupIPAddr, which returns an older type, keeps the zone.
#
# Seen with: Go 1.26. Explained by: LookupNetIP in src/net/lookup.go of Go is made of LookupIP, whose net.IP has no place for a
# zone, although the netip.Addr that LookupNetIP returns has one. RFC 4007, section 6: a zone is part of such an address.

. "$(dirname "$0")/lib.bash"

go_program <<'GO'
package main

import (
	"context"
	"fmt"
	"log"
	"net"
)

func main() {
	const literal = "fe80::1%lo"
	ctx := context.Background()
	addresses, err := net.DefaultResolver.LookupIPAddr(ctx, literal)
	if err != nil {
		log.Fatal(err)
	}
	netips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", literal)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(addresses[0].String(), netips[0])
}
GO
read -r older newer < <("$work/program")
[[ $older == fe80::1%lo ]] || cannot "LookupIPAddr does not keep the zone: $older"

report version "$(go version | cut -d' ' -f3)"
report expected "LookupNetIP returns fe80::1%lo for fe80::1%lo"
report seen "LookupNetIP returns $newer, while LookupIPAddr returns $older"
conclude "$newer" "fe80::1"
