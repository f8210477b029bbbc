#!/bin/bash
#
# Question: can a Go program tell a rule that refuses packets from a rule that looks a table up, by vishvananda/netlink?
#
# Why it matters: a program that compares the ip rules of a host with those that it made, or prints them, sees a rule of type
# unreachable, prohibit or blackhole as one without any effect. It can add such a rule, but not recognise it.
#
# Seen with: github.com/vishvananda/netlink v1.3.1. Explained by: RuleListFiltered() in rule_linux.go reads the attributes and
# the type of service from struct rtmsg, but not its field Type, which is the action (FR_ACT_* in linux/fib_rules.h).

. "$(dirname "$0")/lib.bash"

space host
go_program github.com/vishvananda/netlink@v1.3.1 <<'GO'
package main

import (
	"fmt"
	"log"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func main() {
	rule := netlink.NewRule()
	rule.Priority, rule.Type, rule.Family = 100, unix.RTN_UNREACHABLE, unix.AF_INET
	if err := netlink.RuleAdd(rule); err != nil {
		log.Fatal(err)
	}
	rules, err := netlink.RuleList(unix.AF_INET)
	if err != nil {
		log.Fatal(err)
	}
	for _, r := range rules {
		if r.Priority == 100 {
			fmt.Println("added", rule.Type, "listed", r.Type)
		}
	}
}
GO
seen=$(in_space "$host" "$work/program")
# The control: the rule that the library made is one that refuses.
[[ $(ip -n "$host" rule show priority 100) == *unreachable* ]] || cannot "the library made another rule"

report version "vishvananda/netlink v1.3.1"
report expected "RuleList gives the type of a rule as RuleAdd took it: 7, RTN_UNREACHABLE, which ip(8) shows"
report seen "$seen"
conclude "$seen" "added 7 listed 0"
