#!/bin/bash
#
# Question: do the flags of a table pass through the Go library google/nftables, to the kernel and back?
#
# Why it matters: a program that wants its table to belong to it (flag owner), or to be switched off for a while (flag
# dormant), gets a plain table and no error, and cannot tell from the list of tables either. It has to use netlink itself.
#
# Seen with: github.com/google/nftables v0.3.0 on a little-endian machine. Explained by: addTable() in table.go writes four zero
# bytes as NFTA_TABLE_FLAGS, whatever Table.Flags is. tableFromMsg() reads the attribute in the machine's byte order, though
# nf_tables sends its numbers in network byte order (NFTA_TABLE_FLAGS is NLA_BE32 in net/netfilter/nf_tables_api.c).

. "$(dirname "$0")/lib.bash"

need nft
space host
go_program github.com/google/nftables@v0.3.0 golang.org/x/sys@v0.31.0 <<'GO'
package main

import (
	"fmt"
	"log"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

func main() {
	conn, err := nftables.New()
	if err != nil {
		log.Fatal(err)
	}
	conn.AddTable(&nftables.Table{Name: "made", Family: nftables.TableFamilyINet, Flags: unix.NFT_TABLE_F_DORMANT})
	if err := conn.Flush(); err != nil {
		log.Fatal(err)
	}
	tables, err := conn.ListTables()
	if err != nil {
		log.Fatal(err)
	}
	for _, table := range tables {
		fmt.Println(table.Name, table.Flags)
	}
}
GO
# The control: the same flag, set by nft.
in_space "$host" nft add table inet control '{ flags dormant; }' || cannot "nft refuses a dormant table"
[[ $(in_space "$host" nft list table inet control) == *dormant* ]] || cannot "nft does not show the flag"
listed=$(in_space "$host" "$work/program" | sort | tr '\n' ' ')
made=$(in_space "$host" nft list table inet made | grep -c dormant || true)

report version "google/nftables v0.3.0"
report expected "a table that is added with the flag dormant (1) is dormant, and one that nft made dormant is listed with 1"
report seen "nft shows 'flags dormant' $made times for the library's table; names and flags that the library lists: ${listed% }"
conclude "$made; ${listed% }" "0; control 16777216 made 0"
